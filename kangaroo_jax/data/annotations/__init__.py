"""Annotation files of any format: records, and conversations of them."""
