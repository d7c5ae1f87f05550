"""Reads what training wrote: weights, configs, tokenizers; and the sums by which damage is found."""
