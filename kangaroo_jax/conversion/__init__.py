"""Converts weights: Hugging Face, PyTorch and Meta files to our checkpoints and back."""
