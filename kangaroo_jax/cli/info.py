"""`kangaroo info`."""


def info(*, json: bool = False) -> None:
    """Print versions, devices, memory and disk, as they are kept beside a run in machine.jsonl.

        kangaroo info --json

    Args:
        json: print JSON
    """
    from json import dumps

    from kangaroo_jax.machine import described, facts

    found = facts()
    print(dumps(found, indent=2) if json else "\n".join(described(found)))


COMMANDS = {"": info}
