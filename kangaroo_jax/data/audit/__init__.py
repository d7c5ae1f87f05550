"""Checks and statistics of training data before training: records, media, lengths."""
