"""Videos and images: where they lie, what they are, their frames."""
