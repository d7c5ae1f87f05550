"""`kangaroo quickstart`: a small world, a small model trained on it, and a report."""
