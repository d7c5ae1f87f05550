"""The error of bad input, apart from `conventions` so that what never computes need not import JAX."""


class UserError(Exception):
    """Bad input. The command line prints its one-line message and exits with code 2."""
