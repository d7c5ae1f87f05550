"""Reads one's own data: a table with columns that are found by name, a folder of labels, or any annotation format."""

import collections
import csv
import dataclasses
import difflib
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kangaroo_jax.data.annotations.conversation import Conversation, Media, Turn, escaped
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.audit.check import media_in
from kangaroo_jax.data.media.addresses import is_remote
from kangaroo_jax.errors import UserError, printable
from kangaroo_jax.finetune.wording import quoted
from kangaroo_jax.system.json_text import json_lines
from kangaroo_jax.system.progress import Tell

# What a column may be called, the likeliest name first.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "video": ("video", "video_path", "file", "filename", "file_name", "path", "clip", "media", "image", "image_path"),
    "question": ("question", "prompt", "query", "instruction"),
    "answer": ("answer", "label", "response", "caption", "output", "target", "class"),
    "start": ("start", "begin", "from"),
    "end": ("end", "stop", "to"),
    "split": ("split", "subset", "fold"),
}
NEEDED = ("video", "question", "answer")
HELD_OUT_NAMES = ("test", "val", "valid", "validation", "dev", "eval", "held_out", "held-out")
_OURS = ("conversations", "messages")  # columns of an annotation format in a table
TABLES = (".csv", ".tsv")
_SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
_LEAD = re.compile(r"(?:sep=.\n|[\s,;|]*\n)*", re.IGNORECASE)  # before the header, as spreadsheets leave it


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation whose last turn is the answer to learn."""

    conversation: Conversation
    where: str  # file and line
    held_out: bool | None = None  # as its row says, None where it says nothing
    options: tuple[str, ...] = ()  # lettered ones of a multiple-choice question, as its record has them
    letter: str = ""  # the right one, where the record has `options`

    @property
    def video(self) -> str:
        """The file that it is about; "" for text alone."""
        return self.conversation.media[0].path if self.conversation.media else ""

    @property
    def answer(self) -> str:
        """What is to be answered at the end."""
        return self.conversation.turns[-1].text.strip()

    @property
    def question(self) -> str:
        """The user's last text."""
        return next((turn.text for turn in reversed(self.conversation.turns) if turn.role == "user"), "")


def read_examples(
    path: str | Path, tell: Tell, *, columns: Mapping[str, str] | None = None, question: str = "", media_root: str = ""
) -> list[Example]:
    """The examples of a table, a folder of labels or an annotation file.

    Args:
        path: FILE.csv, FILE.tsv, a folder whose sub-folders are labels, or any format of docs/data.md.
        tell: is told how the data was understood.
        columns: names of a table's columns by what they are ("question": "Frage").
        question: asked of every video where the data has none.
        media_root: folder of the media that a file names; by default its own.

    Raises:
        UserError: naming file and line: a column, field or medium is missing, or a video has two answers.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; --data is a table (CSV, TSV), a folder of labels, or JSON")
    if path.suffix.lower() in _SPREADSHEETS:
        raise UserError(f"{path}: is a spreadsheet; save it as CSV (UTF-8)")
    if path.is_dir():
        found = _labels(path, question, tell)
    elif path.suffix.lower() in TABLES and not _is_format(path):
        found = _table(path, columns or {}, question, media_root, tell)
    else:
        if columns:
            raise UserError(f"{path}: --columns is for a table (CSV or TSV)")
        file = AnnotationFile(path, Path(media_root or path.parent).absolute())
        tell(f"{file.describe()}")
        found = [Example(file[i], f"{path}, record {i + 1}") for i in range(len(file))]
        found = _with_options(path, found)
    for example in found:
        if not example.conversation.turns or example.conversation.turns[-1].role != "assistant":
            raise UserError(f"{example.where}: ends without an answer to learn")
    if not found:
        raise UserError(f"{path}: holds no examples")
    return _once(found, tell)


def _with_options(path: Path, found: Sequence[Example]) -> list[Example]:
    """The examples of a JSONL file with the options and the letter that a record has in `options` and `answer`."""
    rows = [row for _, row in json_lines(path)] if path.suffix == ".jsonl" else []
    if len(rows) != len(found):
        return list(found)
    changed = []
    for example, row in zip(found, rows, strict=True):
        options = row.get("options") if isinstance(row, dict) else None
        if isinstance(row, dict) and isinstance(options, list) and options and "answer" in row:
            example = dataclasses.replace(example, options=tuple(map(str, options)), letter=str(row["answer"]))
        changed.append(example)
    return changed


def template(path: Path) -> list[str]:
    """Write a table to fill in to `path`; lines that explain its columns. Raises UserError where it exists."""
    if path.exists():
        raise UserError(f"{path}: exists already; give another name")
    rows = [
        ("video", "question", "answer", "start", "end", "split"),
        ("clips/a.mp4", "What does the worker do?", "tightens a bolt", "", "", ""),
        ("clips/b.mp4", "What does the worker do?", "drills a hole", "2.5", "8", ""),
        ("clips/c.mp4", "What does the worker do?", "tightens a bolt", "", "", "test"),
    ]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", delimiter="\t" if path.suffix.lower() == ".tsv" else ",").writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
    return [
        "video     a file, seen from the folder of this table; an image will do",
        "question  what is asked; the same words for the same kind of question teach best",
        "answer    what is to be answered: a word or a sentence; short answers can be scored",
        "start     first second of the part that is meant; empty is the beginning (the column may be left out)",
        "end       last second of it; empty is the end (may be left out)",
        "split     test keeps a row out of the training; empty leaves that to the command (may be left out)",
        f"then: kangaroo finetune --base=MODEL --data={path} --workdir=RUN --dry-run",
    ]


def _is_format(path: Path) -> bool:
    """Whether a table's columns are those of an annotation format."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    return any(name in header for name in _OURS)


def _table(path: Path, columns: Mapping[str, str], question: str, media_root: str, tell: Tell) -> list[Example]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")  # "Unicode text" of Excel
        found = "is UTF-16 text" if wide else f"not UTF-8 text (byte {error.start})"
        raise UserError(f"{path}: {found}; save the table as UTF-8 (a spreadsheet's CSV UTF-8)") from None
    lead = _LEAD.match(text).end()  # type: ignore[union-attr]  # matches everywhere
    before, text = text.count("\n", 0, lead), text[lead:]
    reader = csv.DictReader(io.StringIO(text), delimiter=_delimiter(path, text), skipinitialspace=True)
    if not (reader.fieldnames or ()):
        raise UserError(f"{path}: is empty; kangaroo data init writes a table to fill in")
    names = _columns_of(path, reader.fieldnames or (), columns, question)
    tell(f"{path}: " + ", ".join(f"{what} is column {name!r}" for what, name in names.items()))
    root = Path(media_root or path.parent).absolute()  # the run writes the paths into files of its own
    examples: list[Example] = []
    try:
        for row in reader:
            where = f"{path}, line {before + reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: has {'more' if None in row else 'fewer'} fields than the header")
            if not any(map(str.strip, row.values())):  # as a spreadsheet leaves them at its end
                continue
            fields = {what: row[name].strip() for what, name in names.items()}
            fields.setdefault("question", question)
            examples.append(_example(fields, where, root, len(examples)))
    except csv.Error as error:
        raise UserError(f"{path}, line {before + reader.reader.line_num}: not a readable table ({error})") from None
    return examples


def _delimiter(path: Path, text: str) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    header = text.partition("\n")[0]
    return max(",;\t|", key=header.count)


def _columns_of(path: Path, header: Sequence[str], given: Mapping[str, str], question: str) -> dict[str, str]:
    """What -> the column's name. Raises UserError that names the nearest column for one that is missing."""
    found: dict[str, str] = {}
    plain = {_plain(name): name for name in header}
    for what, name in given.items():
        if what not in COLUMNS or name not in header:
            known = ", ".join(COLUMNS) if what not in COLUMNS else ", ".join(header)
            raise UserError(f"{path}: --columns={what}={name} means nothing here; there are {known}")
        found[what] = name
    for what, names in COLUMNS.items():
        match = next((plain[one] for one in names if one in plain), None)
        if what not in found and match is not None:
            found[what] = match
            alike = [name for name in header if _plain(name) == _plain(match)]
            if len(alike) > 1:
                raise UserError(
                    f"{path}: its columns {' and '.join(map(repr, alike))} may both be the {what}; rename one"
                )
    for name in found.values():
        if header.count(name) > 1:
            raise UserError(f"{path}: {header.count(name)} columns are called {name!r}; rename all but one")
    for what in NEEDED:
        if what in found or (what == "question" and question):
            continue
        left = {key: name for key, name in plain.items() if name not in found.values()}
        close = [m for one in COLUMNS[what] for m in difflib.get_close_matches(one, left, 1, 0.5)]
        near = f"; the nearest is {left[close[0]]!r}: --columns={what}={left[close[0]]}" if close else ""
        more = ", or --question='...' asks the same of every video" if what == "question" else ""
        raise UserError(
            f"{path}: has no column for the {what} ({', '.join(COLUMNS[what][:4])}); its columns are "
            f"{', '.join(map(repr, header))}{near}{more}"
        )
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _example(fields: Mapping[str, str], where: str, root: Path, number: int) -> Example:
    for what in NEEDED:
        if not fields[what]:
            raise UserError(f"{where}: its {what} is empty")
    remote, file = is_remote(fields["video"]), root / fields["video"]
    if not remote and not file.is_file():
        what = "is no file" if file.exists() else "no such file"
        raise UserError(f"{where}: {file}: {what}; paths are seen from {root} (--media-root=FOLDER)")
    ends: dict[str, float | None] = {}
    for what in ("start", "end"):
        try:
            ends[what] = float(fields[what]) if fields.get(what) else None
        except ValueError:
            raise UserError(f"{where}: its {what} is {fields[what]!r}, no number of seconds") from None
        if (seconds := ends[what]) is not None and not 0 <= seconds < math.inf:
            raise UserError(f"{where}: its {what} is {fields[what]!r}, no second of a video")
    if ends["end"] is not None and ends["end"] <= (ends["start"] or 0.0):
        raise UserError(f"{where}: its end, {ends['end']:g}, is not after its start, {ends['start'] or 0.0:g}")
    split = fields.get("split", "").lower()
    held_out = None if not split else split in HELD_OUT_NAMES
    path = fields["video"] if remote else str(file)
    return Example(_asked(path, fields["question"], fields["answer"], f"{number}", **ends), where, held_out)


def _asked(path: str, question: str, answer: str, name: str, **ends: float | None) -> Conversation:
    kind = "image" if Path(path).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif") else "video"
    if not is_remote(path) and Path(path).is_file():
        kind = next((kind for (_, kind) in media_in([path])), kind)
    turns = (Turn("user", f"<{kind}>\n{escaped(question)}"), Turn("assistant", answer))
    start, end = (ends.get(key) if kind == "video" else None for key in ("start", "end"))
    return Conversation(f"{name}-{Path(path).stem}", turns, (Media(kind, path, start, end),))


def _labels(folder: Path, question: str, tell: Tell) -> list[Example]:
    passed = (".", "__MACOSX")  # the latter is what a zip file of macOS leaves
    labels = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(passed))
    if len(labels) < 2:
        raise UserError(f"{folder}: needs a sub-folder for each label, at least two, with videos in it")
    names = [label.name.replace("_", " ").strip() for label in labels]
    _check_labels(labels, names)
    question = question or f"Which of these is it: {', '.join(names)}?"
    examples: list[Example] = []
    for label, name in zip(labels, names, strict=True):
        media = media_in([str(label.absolute())], tell)
        if not media:
            raise UserError(f"{label}: holds no video or image; each sub-folder of --data is a label")
        for path, _ in sorted(media):
            examples.append(Example(_asked(path, question, name, str(len(examples))), path))
    tell(f"{folder}: {len(labels)} labels ({', '.join(names[:8])}); the question is {printable(question)!r}")
    return examples


def _check_labels(labels: Sequence[Path], names: Sequence[str]) -> None:
    """Raise UserError for names that are no answers, that are the same answer, or that are the parts of a split."""
    before: dict[str, Path] = {}
    for label, name in zip(labels, names, strict=True):
        if not name:
            raise UserError(f"{label}: its name is the answer to learn; give it letters")
        other = before.setdefault(name.lower(), label)
        if other is not label:
            raise UserError(f"{label}: is the same label as {other.name!r}; put their videos in one folder")
    parts = {"train", "training", *(name.replace("_", " ") for name in HELD_OUT_NAMES)}
    if before.keys() <= parts:
        train, test = (
            [p for key, p in before.items() if key.startswith("train") == wanted] for wanted in (True, False)
        )
        advice = f"--data={train[0]} --held-out={test[0]}" if train and test else "--data=FOLDER with labels in it"
        raise UserError(
            f"{labels[0].parent}: its sub-folders ({', '.join(names)}) are parts of a split, no labels; give {advice}"
        )


def _once(examples: Sequence[Example], tell: Tell) -> list[Example]:
    """The examples without repetitions. Raises UserError for a question about a video with two answers."""
    kept: dict[tuple[object, ...], Example] = {}
    for example in examples:
        media = tuple(dataclasses.replace(m, path=os.path.realpath(m.path)) for m in example.conversation.media)
        asked = (media, example.conversation.turns[:-1])
        before = kept.setdefault(asked, example)
        if before.answer != example.answer:
            raise UserError(
                f"{example.where}: {Path(example.video).name} is listed twice with other answers: "
                f"{quoted(example.answer)} here, {quoted(before.answer)} in {before.where.rpartition(', ')[2]}; "
                "keep one"
            )
    if len(kept) < len(examples):
        tell(f"rows that are repeated, each taken once: {len(examples) - len(kept)}")
    return list(kept.values())


def answers_of(examples: Sequence[Example]) -> dict[str, int]:
    """answer -> how many examples have it, the most frequent first."""
    return dict(collections.Counter(example.answer for example in examples).most_common())
