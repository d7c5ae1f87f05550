"""`python -m kangaroo_jax JOB` is `kangaroo JOB`."""

import signal
import sys


def main() -> int:
    """The command; returns its exit code. Ctrl-C waits until it can be answered in one line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    from kangaroo_jax.cli.main import start

    return start()


if __name__ == "__main__":
    sys.exit(main())
