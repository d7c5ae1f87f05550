"""The published benchmarks from their official files: a file each."""
