"""`kangaroo doctor`."""

from kangaroo_jax.cli.arguments import listed


def doctor(*, extras: str = "") -> None:
    """Test what is installed, and say what each extra would add; exit code 1 if something does not work.

        kangaroo doctor

    Each self-test runs in a process of its own: decoding, the device, a tiny training with a question, and what the
    installed extras bring. Nothing is downloaded.

    Args:
        extras: look at these only, with commas, of the names in setup.py
    """
    from kangaroo_jax.doctor.run import check_extras, examine
    from kangaroo_jax.machine import described, facts

    chosen = check_extras(listed(extras))
    print("\n".join(described(facts())))
    if not examine(("", *chosen) if chosen else None):
        raise SystemExit(1)


COMMANDS = {"": doctor}
