"""`kangaroo quickstart`: a generated corpus, a small model trained on it, and a report."""
