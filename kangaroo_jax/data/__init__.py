"""From files to a PackedBatch."""
