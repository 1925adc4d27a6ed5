"""A speedrun: optimizers compared by steps to a target loss."""
