"""The command line: the table of jobs, their flags, and the code that runs them."""
