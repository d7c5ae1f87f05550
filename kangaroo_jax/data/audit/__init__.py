"""What is in training data before it is trained on: records, media, lengths."""
