"""The error of bad input, apart from `conventions` so that what never computes need not import JAX."""

from kangaroo_jax.system.terminal import printable


class UserError(Exception):
    """Bad input. The command line prints its one-line message and exits with code 2."""

    def __str__(self) -> str:
        """The message as one line, whatever names stand in it (`terminal.printable`)."""
        return printable(super().__str__())
