"""Conversations to packed batches: mixture, recipes, packs, the loader."""
