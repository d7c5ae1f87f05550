"""Runs the stages over shards, in worker processes or under Ray."""
