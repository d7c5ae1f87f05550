"""Videos and images: where they are stored, what they are, their frames."""
