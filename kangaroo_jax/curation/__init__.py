"""Curation, annotation and instruction sets: from raw videos to a bilingual training set."""
