"""Fine-tuning on one's own videos: a table, its split by video, settings, training, and the held-out answers."""
