"""`kangaroo doctor`: whether what is installed works, and what each extra would add."""
