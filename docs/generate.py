"""Writes the pages of `docs/reference` that are read off the code: `python docs/generate.py`.

Config keys from `kangaroo_jax/config.py` with their comments, what each stage changes from `configs/`, and the help of
every command.
"""

import dataclasses
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kangaroo_jax import config
from kangaroo_jax.cli import helping
from kangaroo_jax.cli.jobs import JOBS, commands_of

FOLDER = Path(__file__).parent / "reference"
MADE = "\n<!-- python docs/generate.py writes this page -->\n"


def comments(source: str) -> dict[tuple[str, str], str]:
    """The comment of each field, by (class, field): that at its end, or the lines above it."""
    found: dict[tuple[str, str], str] = {}
    above: list[str] = []
    section = field = ""
    last = 0  # the line of the latest field
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line, row = token.line, token.start[0]
        if named := re.match(r"class (\w+)", line):
            section, above = named[1], []
        if named := re.match(r"    (\w+): ", line):
            if row != last and token.type != tokenize.COMMENT:
                field, last = named[1], row
                if above:
                    found[section, field] = " ".join(above)
                above = []
        if token.type == tokenize.COMMENT and line.startswith("    "):
            text = token.string.lstrip("# ").strip()
            if row == last:
                found[section, field] = " ".join(filter(None, [found.get((section, field), ""), text]))
            elif line.strip().startswith("#"):
                above.append(text)
        elif token.type in (tokenize.NAME, tokenize.OP) and row != last:
            above = []
    return found


def section_table(section: config.Section, told: dict[tuple[str, str], str]) -> Iterator[str]:
    """Lines of a section: its docstring, and a table of its keys."""
    path = section.PATH
    yield f"## `{path}`\n\n{type(section).__doc__}\n"
    yield "| key | default | |\n|---|---|---|"
    inner = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        comment = told.get((type(section).__name__, field.name), "").replace("|", "\\|")
        if isinstance(value, config.Section):
            inner.append(value)
            yield f"| `{field.name}.` | | {comment or 'the section below'} |"
        else:
            yield f"| `{field.name}` | {shown(value)} | {comment} |"
    yield ""
    for value in inner:
        yield from section_table(value, told)


def shown(value: Any) -> str:
    """A value in a cell of a table."""
    text = repr(value)
    return f"`{text}`".replace("|", "\\|") if text != "''" else "empty"


def config_page() -> str:
    """Every key of a training stage."""
    told = comments(Path(config.__file__).read_text(encoding="utf-8"))
    body = "\n".join(section_table(config.StageConfig(), told))
    return f"""# Every key of a stage

A stage is a file of `configs/` that changes some of these keys ([what each stage changes](curriculum.md));
`--config.KEY=VALUE` changes them on the command line: `--config.data.fps=2`. The defaults are those of the preset
`kangaroo_8b`. A key whose text says
*inferred* is not known from the authors of Kangaroo ([decisions](../decisions.md)).

{body}{MADE}"""


def curriculum_page() -> str:
    """What the five stages change."""
    stages = {name: dict(config.StageConfig.load(name).flat()) for name in config.STAGES}
    default = dict(config.StageConfig().flat())
    keys = [key for key in default if any(stage[key] != default[key] for stage in stages.values()) and key != "stage"]
    head = f"| key | {' | '.join(name.replace('_', ' ') for name in stages)} |\n|---|{'---|' * len(stages)}"
    rows = [f"| `{key}` | {' | '.join(shown(stage[key]) for stage in stages.values())} |" for key in keys]
    table = "\n".join([head, *rows])
    return f"""# The curriculum

The five stages of `kangaroo curriculum`, each a file of `configs/`, and every key in which they differ from the
defaults or from one another. A stage starts from the weights of the one before it.

{table}

`optimizer.trainable` is a list of (pattern of a parameter's path, share of the learning rate); the first that matches
counts, and `None` freezes. How a stage is run: [training](../training.md).
{MADE}"""


def commands_page() -> str:
    """The help of every command."""
    parts = []
    for job, line in JOBS.items():
        parts.append(f"## kangaroo {job}\n\n{line.summary[0].upper()}{line.summary[1:]}.\n")
        commands = commands_of(job)
        for name in [name for name in commands if name] if "" not in commands else list(commands):
            words = [name] if name else ["--help"]
            title = f"### kangaroo {job} {name}\n\n" if name else ""
            text = helping.help_text(job, line.summary, commands, words).rstrip()
            parts.append(f"{title}```text\n{text}\n```\n")
    return "# Every command\n\nWhat each prints with `--help`.\n\n" + "\n".join(parts) + MADE


PAGES = {"config.md": config_page, "curriculum.md": curriculum_page, "commands.md": commands_page}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
