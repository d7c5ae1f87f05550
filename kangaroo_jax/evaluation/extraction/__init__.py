"""Reads the option that an answer names: our strict rules, and those of public harnesses and official scripts."""
