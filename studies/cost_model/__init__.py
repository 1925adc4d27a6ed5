"""The cost of a step on many GPUs: FLOPs, bytes and messages, by counting."""
