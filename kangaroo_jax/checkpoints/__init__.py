"""Reads checkpoints: weights, configs and tokenizers, and the digests that reveal damage."""
