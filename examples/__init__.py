"""Dualized in other people's training code."""
