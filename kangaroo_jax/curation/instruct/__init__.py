"""Conversations about clips, made from their captions: the instruction tuning set."""
