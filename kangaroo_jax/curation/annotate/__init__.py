"""Captions of clips by models: key frames -> frame captions -> one caption of the video -> refinement."""
