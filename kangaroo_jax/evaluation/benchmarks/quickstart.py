"""The quickstart's own held-out questions, and any JSON lines like them: conversations with `answer` and `options`."""

from collections.abc import Iterator
from pathlib import Path

from kangaroo_jax.data.annotations.sources import read_conversations
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import files
from kangaroo_jax.evaluation.benchmarks.question import Benchmark, Question
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.system.json_text import read_lines

_GROUPS = {"format": "format", "question_kind": "kind", "language": "language"}


def read(folder: Path) -> Iterator[Question]:
    """The questions of `eval_image.jsonl`, `eval_short.jsonl` and `eval_long.jsonl` in the corpus of a quickstart."""
    base = folder / "corpus" if (folder / "corpus").is_dir() else folder
    files.found(base, "eval_*.jsonl")
    for path in sorted(base.glob("eval_*.jsonl")):
        yield from read_file(path, groups={"split": (path.stem.removeprefix("eval_"),)})


def read_file(
    path: Path, folder: Path | None = None, *, groups: dict[str, tuple[str, ...]] | None = None
) -> Iterator[Question]:
    """The questions of a file of LLaVA's conversations, each ending with its true answer, with the key `answer`.

    Its media are in `folder`, or beside the file where the first of them is there alone.
    """
    rows = list(read_lines(path))
    beside = path.absolute().parent
    root = beside if folder is None or (_has_media(beside, path) and not _has_media(folder, path)) else folder
    for number, (conversation, (where, row)) in enumerate(zip(read_conversations([path], root), rows, strict=True)):
        if "answer" not in row:
            raise UserError(f"{where}: has no answer, only {', '.join(list(row)[:12])}")
        asked, _ = conversation.split_answer()
        turns = [turn for turn in asked.turns if turn.role == "user"]
        if len(turns) != 1 or len(asked.turns) != 1:
            raise UserError(f"{where}: has several rounds; an evaluation asks one question")
        text = turns[0].text
        for medium in asked.media:
            text = text.replace(f"<{medium.kind}>", "", 1)
        options = files.texts(where, row, "options") if row.get("options") else ()
        found = {name: (str(row[key]),) for key, name in _GROUPS.items() if key in row}
        yield Question(
            f"{path.stem}/{conversation.id or number}",
            asked.media,
            text.strip(),
            options,
            str(row["answer"]),
            kind="choice" if options else "exact",
            groups={**(groups or {}), **found},
            prompt=text.strip(),
        )


def _has_media(folder: Path, path: Path) -> bool:
    """Whether the first media that the file names are in the folder."""
    named = next((c.media for c in read_conversations([path], folder) if c.media), ())
    return all(files.is_there(medium) for medium in named)


QUICKSTART = Benchmark(
    name="quickstart",
    title="Quickstart",
    read=read,
    fetch="the folder of `kangaroo quickstart --workdir=...`",
    licence="generated",
    size="a few MB",
    questions=0,
    wordings=WORDINGS["quickstart"],
    readings={},
    note="open questions are right where the text is the expected one",
)
