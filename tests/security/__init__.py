"""Attacks: what comes from elsewhere runs nothing, reads nothing else and marks up nothing."""
