"""`kangaroo curate export`: the kept clips as a dataset for training, with a data card that states their origin.

    OUTPUT/export/NAME/1.0.0/...      TFDS, ArrayRecord shards (`kangaroo data`, Grain and tfds read it)
    OUTPUT/export/NAME.jsonl          the same in LLaVA's format, media by path
    OUTPUT/export/NAME.md             the data card
    OUTPUT/clips/ID.mkv               clips cut from longer files, where media are embedded

Conversations are those of `kangaroo instruct` (or of any annotation file), captions of `kangaroo annotate`, or the
captions that the input had: the first of these that exists in OUTPUT, unless a file is named. Cutting copies packets
from the key frame before the start, without re-encoding.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av

import kangaroo_jax
from kangaroo_jax.curation.engine import shards
from kangaroo_jax.curation.stages import STAGES
from kangaroo_jax.curation.stages.base import Row
from kangaroo_jax.data.annotations.conversation import Conversation, Media
from kangaroo_jax.data.annotations.dataset import DatasetPlan, write_dataset
from kangaroo_jax.data.annotations.formats import caption_record
from kangaroo_jax.data.annotations.sources import AnnotationFile
from kangaroo_jax.data.media.addresses import is_remote, short
from kangaroo_jax.data.media.containers import member_of
from kangaroo_jax.data.media.picker import open_video, start_seconds
from kangaroo_jax.data.media.storage import absolute, join, local
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_lines, read_objects, utf8
from kangaroo_jax.system.progress import Tell

MEDIA = ("embed", "reference", "keyframes")
_WHOLE = 0.05  # seconds by which a clip may be shorter than its file and still count as the whole file
_Place = tuple[str, float | None, float | None]
_Places = Mapping[_Place, tuple[Row, Row]]


def export(root: Path, config: Mapping[str, Any], name: str, annotations: str = "", tell: Tell = print) -> Path:
    """Write the dataset, the JSONL and the card; returns the dataset's folder.

    Conversations whose medium cannot be read are left out and counted in a printed line.

    Raises UserError: nothing was chosen, no conversation is about a chosen clip, or no medium can be read.
    """
    settings = config["export"]
    if settings["media"] not in MEDIA or not name.isidentifier():
        raise UserError(
            f"curate export: --name must be a plain word, and config.export.media one of {', '.join(MEDIA)}"
        )
    if not (root / "selected.jsonl").exists():
        raise UserError(f"{root}: nothing was chosen here yet; run kangaroo curate select first")
    entries = list(read_objects(root / "selected.jsonl"))
    rows = {row["id"]: row for row in shards.all_scores(root)}
    source = Path(annotations) if annotations else _found(root)
    tell(
        f"export: conversations of {source}; --annotations=FILE takes others"
        if not annotations
        else f"export: {source}"
    )
    conversations = _of_kept(source, root, _places(root, entries, rows), entries, settings["media"], tell)
    folder = root / "export"
    listed = shards.lines(map(_llava, conversations))
    fingerprint = hashlib.sha256(listed).hexdigest()[:16]
    plan = DatasetPlan(name, folder, settings["media"] == "embed", settings["shard_samples"])
    written = write_dataset(plan, conversations, fingerprint)  # refuses a folder with other conversations
    shards.put(root, folder / f"{name}.jsonl", listed)
    card = data_card(root, config, name, entries, conversations, source)
    shards.put(root, folder / f"{name}.md", utf8(card))
    return written


# --------------------------------------------------------------------------- conversations


def _found(root: Path) -> Path:
    """The annotations in OUTPUT: conversations, else captions, else the choice with the captions of the input."""
    names = ("instruct.jsonl", "captions.jsonl", "selected.jsonl")
    return next(root / name for name in names if (root / name).exists())


def _of_kept(
    source: Path, root: Path, places: _Places, entries: Sequence[Row], how: str, tell: Tell
) -> list[Conversation]:
    """The conversations about kept clips, with their media as exported.

    Raises UserError: there are none, or no medium can be read.
    """
    kept, failures, clips = [], [], set[str]()
    for one in _conversations(source, root, entries):
        if not all(_place(medium) in places for medium in one.media):
            continue
        try:
            media = tuple(_placed(medium, places, root, how) for medium in one.media)
        except UserError as error:
            failures.append(f"{one.id}: {error}")
            continue
        kept.append(dataclasses.replace(one, media=media))
        clips.update(places[_place(medium)][0]["id"] for medium in one.media)
    if failures:
        summary = f"{len(failures):,} conversations have a medium that cannot be read, such as {failures[0]}"
        if not kept:
            raise UserError(f"curate export: all {summary}")
        tell(f"export: {summary}; they are left out")
    if not kept:
        raise UserError(
            f"curate export: {source} has no conversation about a clip that was kept. Run kangaroo annotate "
            f"--input={root / 'selected.jsonl'} for captions, kangaroo instruct --input={root / 'refined.jsonl'} for "
            "questions, then this again; or give captions in the manifest of --input, or --annotations=FILE"
        )
    tell(f"export: {len(kept):,} conversations about {len(clips):,} of {len(entries):,} kept clips")
    return kept


def _conversations(source: Path, root: Path, entries: Sequence[Row]) -> Iterator[Conversation]:
    if source.resolve() == root / "selected.jsonl":
        for entry in entries:
            if entry["caption"]:
                yield _captioned(entry, entry["id"], entry["media"])
        return
    if not source.exists():
        raise UserError(f"{source}: no such file")
    first = next(read_lines(source), ("", {}))[1] if source.suffix == ".jsonl" else {}
    if "outcome" in first and "clip" in first:  # written by kangaroo annotate
        for _, row in read_lines(source):
            if row.get("caption") and row.get("outcome") == "ok":
                yield _captioned(row, row["id"], join(str(source.resolve().parent), row["media"]))
        return
    file = AnnotationFile(source)
    for i in range(len(file)):
        yield file[i]


def _captioned(row: Row, name: str, path: str) -> Conversation:
    kind = "image" if row["start"] is None else "video"
    conversation = caption_record(row["caption"], kind, path, name).conversation
    media = (dataclasses.replace(conversation.media[0], start=row["start"], end=row["end"]),)
    return dataclasses.replace(conversation, media=media, language=row["language"])


def _place(medium: Media) -> _Place:
    """A medium's key: its file and its start and end, rounded to hundredths of a second."""
    ends = (None if value is None else round(value, 2) for value in (medium.start, medium.end))
    start, end = ends
    return absolute(medium.path) if os.path.exists(medium.path) else medium.path, start, end


def _places(root: Path, entries: Sequence[Row], rows: Mapping[str, Row]) -> dict[_Place, tuple[Row, Row]]:
    """The entry and the scores of each clip, by its key; a whole file also by the key without seconds."""
    places = {}
    for entry in entries:
        row = rows[entry["id"]]
        medium = Media(entry["kind"], entry["media"], entry["start"], entry["end"])
        places[_place(medium)] = entry, row
        if _is_whole(row):
            places[_place(Media(entry["kind"], entry["media"]))] = entry, row
    return places


def _is_whole(row: Row) -> bool:
    return row["kind"] == "image" or (row["start"] < _WHOLE and row["end"] > row["probe"]["seconds"] - _WHOLE)


def _placed(medium: Media, places: _Places, root: Path, how: str) -> Media:
    """The medium as exported. Raises UserError: it is gone, or cannot be cut."""
    entry, row = places[_place(medium)]
    if how == "embed" and not is_remote(medium.path) and member_of(medium.path) is None:
        if not os.path.exists(medium.path):
            raise UserError(f"{short(medium.path)}: no such file")
    if _is_whole(row):
        medium = dataclasses.replace(medium, start=None, end=None)
    if medium.kind == "image" or how == "reference":
        return medium
    if how == "keyframes":
        frames = tuple(str(root / frame["path"]) for frame in entry["keyframes"])
        rate = len(frames) / (row["end"] - row["start"])
        return dataclasses.replace(
            medium, path=frames[0], frames=frames, sample_fps=rate, start=None, end=None, duration=None
        )
    if medium.start is None:
        return medium
    path, offset = cut_clip(row["path"], row["start"], row["end"], root, row["id"])
    begin, end = row["start"] - offset or None, row["end"] - offset
    return dataclasses.replace(medium, path=str(path), start=begin, end=end, duration=None)


def _llava(conversation: Conversation) -> Row:
    """A record of LLaVA's format."""
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": speakers[turn.role], "value": turn.text} for turn in conversation.turns]
    record: Row = {"id": conversation.id, "conversations": turns}
    if conversation.language:
        record["language"] = conversation.language
    videos = [medium for medium in conversation.media if medium.kind == "video"]
    for medium in conversation.media:
        record.setdefault(medium.kind, []).append(list(medium.frames) or medium.path)
    for key in ("start", "end", "sample_fps"):
        if any(getattr(medium, key) is not None for medium in videos):
            record[key] = [getattr(medium, key) for medium in videos]
    return record


# ----------------------------------------------------------------------------------- clips


def cut_clip(path: str, start: float, end: float, root: Path, name: str) -> tuple[Path, float]:
    """Copy the packets of a video from the key frame before `start` to `end` into OUTPUT/clips/NAME.mkv.

    Returns the path, and the time in the source at which the copy begins, in seconds. Raises UserError.
    """
    target = root / "clips" / f"{name}.mkv"
    note = target.with_suffix(".json")
    if note.exists() and target.exists():
        return target, json.loads(note.read_bytes())["offset"]
    temporary = root / "stages" / "tmp" / f"{name}.mkv"
    for folder in (target.parent, temporary.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with open_video(local(path)) as (container, stream):
        zero = start_seconds(stream)
        container.seek(int((start + zero) / float(stream.time_base)), stream=stream)
        offset = _copy_packets(container, stream, temporary, end + zero) - zero
    os.replace(temporary, target)
    shards.put(root, note, json.dumps({"offset": round(offset, 3), "of": path}).encode())
    return target, round(offset, 3)


def _copy_packets(container: Any, stream: Any, target: Path, end: float) -> float:
    """Copy packets up to the decoding time `end`; returns the presentation time of the first one."""
    first: int | None = None
    lowest: int | None = None
    with av.open(str(target), "w", format="matroska", options={"fflags": "+bitexact"}) as output:
        copy = output.add_stream_from_template(stream)
        with contextlib.suppress(av.error.EOFError):
            for packet in container.demux(stream):
                if not packet.size or packet.pts is None or (first is None and not packet.is_keyframe):
                    continue
                if first is None:
                    first, lowest = packet.pts, packet.dts if packet.dts is not None else packet.pts
                decode_time = packet.dts if packet.dts is not None else packet.pts
                if float(decode_time * packet.time_base) > end:
                    break
                packet.pts, packet.dts = packet.pts - first, decode_time - first
                packet.stream = copy
                output.mux(packet)
    if first is None or lowest is None:
        raise UserError(f"{target.stem}: no key frame to cut this clip at")
    return float(first * stream.time_base)


# ------------------------------------------------------------------------------------ card


def data_card(
    root: Path,
    config: Mapping[str, Any],
    name: str,
    entries: Sequence[Row],
    conversations: Sequence[Conversation],
    annotations: Path,
) -> str:
    """The data card, Markdown."""
    result = json.loads((root / "funnel.json").read_text(encoding="utf-8"))
    languages = collections.Counter(one.language or "not said" for one in conversations)
    turns = sum(turn.role == "assistant" for one in conversations for turn in one.turns)
    lines = [
        f"# {name}",
        "",
        f"{len(conversations):,} conversations ({turns:,} answers) about {len(entries):,} clips and images, chosen of "
        f"{result['clips']:,} (from {result['items']:,} files). Media: {config['export']['media']}. Written by "
        f"kangaroo_jax {kangaroo_jax.__version__}.",
        "",
        *_table("Sources and licences", ("source", "licence", "kept clips"), _sources(entries)),
        *_table("Funnel", ("rule", "dropped", "left"), [(s["rule"], s["dropped"], s["left"]) for s in result["rules"]]),
        *_table("Languages", ("language", "conversations"), languages.most_common()),
        *_table(
            "Categories", ("category", "before", "after"), [(k or "none", *v) for k, v in result["category"].items()]
        ),
        *_table("Thresholds (ours)", ("key", "value"), [(k, json.dumps(v)) for k, v in config["select"].items()]),
        *_table("Stages", ("stage", "version"), [(stage.name, stage.version) for stage in STAGES]),
        *_table("Models and prompts of the annotations", ("part", "version"), _versions(annotations)),
        "Faces, text and languages were measured by models that err. Licences are those that the manifests state; "
        "where they state none, none is known.",
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""]


def _sources(entries: Sequence[Row]) -> list[tuple[str, str, int]]:
    counts = collections.Counter((entry["source"], entry["licence"] or "not stated") for entry in entries)
    return [(*pair, count) for pair, count in sorted(counts.items())]


def _versions(annotations: Path) -> list[tuple[str, str]]:
    """The models and prompts named in the rows of an annotation file."""
    found: dict[tuple[str, str], None] = {}
    for _, row in read_lines(annotations) if annotations.suffix == ".jsonl" else ():
        source = row.get("source")
        trace: Row = source if isinstance(source, dict) else row
        for part in ("models", "prompts"):
            named = trace.get(part)
            for key, value in named.items() if isinstance(named, dict) else ():
                found[(f"{part}: {key}", str(value))] = None
    return sorted(found)
