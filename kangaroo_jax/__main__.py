"""`python -m kangaroo_jax JOB` is `kangaroo JOB`."""

import _signal  # of which `signal` makes enums: Ctrl-C would print a traceback in these milliseconds
import sys


def main() -> int:
    """The command; returns its exit code. Ctrl-C waits until it can be answered in one line."""
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGINT})

    from kangaroo_jax.cli.main import start

    return start()


if __name__ == "__main__":
    sys.exit(main())
