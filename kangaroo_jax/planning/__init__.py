"""`kangaroo plan`: memory, time and cost of a stage on chips that this machine lacks."""
