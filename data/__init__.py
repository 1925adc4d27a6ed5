"""Tokens from texts: the shard format, tokenizers, corpora, and resumable batches."""
