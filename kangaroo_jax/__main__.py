"""`python -m kangaroo_jax JOB` is `kangaroo JOB`."""

import sys

from kangaroo_jax.cli.main import start

if __name__ == "__main__":
    sys.exit(start())
