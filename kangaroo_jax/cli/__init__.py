"""The command line: the table of jobs, their flags, and what runs them."""
