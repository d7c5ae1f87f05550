"""Datasets as TFDS and Grain read them: ArrayRecord shards with metadata, written without TensorFlow.

    DIR/NAME/1.0.0/{dataset_info.json, features.json, NAME-train.array_record-00000-of-00008, ...}

A record is a conversation; its media are embedded, or named by path. A shard is written to a temporary file and
renamed. Several runs may write shards in any order: an existing shard is kept, and the bytes equal those of one run.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.annotations.conversation import CLIP_KEYS, Conversation, Media, Turn
from kangaroo_jax.data.media.addresses import is_remote
from kangaroo_jax.data.media.array_record import features, read_record
from kangaroo_jax.data.media.containers import member_of, member_suffix
from kangaroo_jax.data.media.storage import MEMBER, absolute, check_file, join, local
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.progress import Tell

VERSION = "1.0.0"
SPLIT = "train"
_GROUP = "group_size:1"  # records of a block: one, for random access


# --------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class DatasetPlan:
    """What a dataset is called, where it goes, and how it is cut into shards."""

    name: str
    root: Path  # the folder of all datasets
    embed: bool  # whether records hold their media or name them by absolute path
    shard_samples: int

    @property
    def folder(self) -> Path:
        """The folder of this dataset."""
        return self.root / self.name / VERSION

    def shard(self, number: int, count: int) -> Path:
        """The file of a shard, named as TFDS names it."""
        return self.folder / f"{self.name}-{SPLIT}.array_record-{number:05d}-of-{count:05d}"


def write_dataset(
    plan: DatasetPlan, conversations: Sequence[Conversation], fingerprint: str, *, tell: Tell = print
) -> Path:
    """Write the shards that are not there yet, then the metadata.

    Args:
        plan: where and how.
        conversations: anything with a length and random access.
        fingerprint: identifies the files they were read from; a folder begun with another one is refused.
        tell: prints a line a shard: rate and time left.

    Returns:
        The dataset's folder.

    Raises:
        UserError: a medium cannot be read, or the folder belongs to another dataset.
    """
    encoder = features()
    count = -(-len(conversations) // plan.shard_samples)
    plan.folder.mkdir(parents=True, exist_ok=True)
    _claim(plan, fingerprint, len(conversations))
    start, written = time.perf_counter(), 0
    for number in range(count):
        path = plan.shard(number, count)
        if path.exists():
            continue
        span = range(number * plan.shard_samples, min((number + 1) * plan.shard_samples, len(conversations)))
        write_records(path, (encode(encoder, conversations[i], plan.embed) for i in span))
        written += len(span)
        seconds = time.perf_counter() - start
        left = sum(not plan.shard(n, count).exists() for n in range(number + 1, count)) * plan.shard_samples
        tell(f"{path.name}: {len(span)} samples; {written / seconds:,.0f}/s, ETA {left * seconds / written:.0f} s")
    _write_metadata(plan, encoder, count, len(conversations))
    return plan.folder


def encode(encoder: Any, conversation: Conversation, embed: bool) -> bytes:
    """A record. Raises UserError if a medium cannot be read."""
    if embed and any(medium.frames for medium in conversation.media):
        raise UserError(
            f"sample {conversation.id!r}: a video given as a list of images cannot be embedded; use --embed=false"
        )
    media = [_encode_medium(medium, embed) for medium in conversation.media]
    turns = [{"role": turn.role, "text": turn.text, "loss": turn.loss} for turn in conversation.turns]
    example = {"id": conversation.id, "language": conversation.language, "turns": turns, "media": media}
    example = _encodable(example)
    return _ordered(encoder.serialize_example(encoder.encode_example(example)))


def _ordered(serialized: bytes) -> bytes:
    """A tf.train.Example with its features in the order of their names, which else differs from process to process."""
    from tensorflow_datasets.proto import tf_example_pb2

    return bytes(tf_example_pb2.Example.FromString(serialized).SerializeToString(deterministic=True))


def _encodable(value: Any) -> Any:
    """The value with strings that UTF-8 cannot encode as bytes: a file name keeps its own, a lone surrogate is "?"."""
    if isinstance(value, str):
        for errors in ("strict", "surrogateescape"):
            with contextlib.suppress(UnicodeEncodeError):
                data = value.encode("utf-8", errors)
                return value if errors == "strict" else data
        return value.encode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: _encodable(one) for key, one in value.items()}
    return [_encodable(one) for one in value] if isinstance(value, list) else value


def _encode_medium(medium: Media, embed: bool) -> dict[str, Any]:
    options = {key: value for key in CLIP_KEYS if (value := getattr(medium, key)) is not None}
    path = medium.path if is_remote(medium.path) or MEMBER in medium.path else absolute(medium.path)
    frames = [frame if is_remote(frame) else absolute(frame) for frame in medium.frames]
    data = read_bytes(medium.path) if embed else b""
    if embed and path.startswith("data:"):
        path = f"data{member_suffix(local(medium.path))}"
    return {
        "kind": medium.kind,
        "path": path,
        "options": json.dumps(options, sort_keys=True),
        "frames": json.dumps(frames),
        "data": data,
    }


def read_bytes(path: str) -> bytes:
    """The bytes of a medium. Raises UserError."""
    member = member_of(path)
    if member is not None:
        return member.read()
    file = local(path)
    check_file(file, path if not path.startswith("data:") else "")
    return file.read_bytes()


def write_records(path: Path, records: Iterator[bytes]) -> None:
    """Write an ArrayRecord file, whole or not at all. Raises OSError if the disk is full."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f".{path.name}.tmp")
    writer = ArrayRecordWriter(str(temporary), _GROUP)
    try:
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        full = os.strerror(errno.ENOSPC)
        if isinstance(error, RuntimeError) and full in str(error):  # the writer's only exception
            raise OSError(errno.ENOSPC, full, str(path)) from error
        raise


def _claim(plan: DatasetPlan, fingerprint: str, samples: int) -> None:
    """Record the plan in the folder, or check that the recorded one is the same. Raises UserError."""
    mine = {"source": fingerprint, "samples": samples, "embed": plan.embed, "shard_samples": plan.shard_samples}
    path = plan.folder / "build.json"
    if not path.exists():
        write_json(path, mine)
    found = json.loads(path.read_text(encoding="utf-8"))
    if found != mine:
        different = ", ".join(key for key in mine if found.get(key) != mine[key])
        raise UserError(f"{plan.folder}: was begun with another {different}; give another --name, or remove it")


def _write_metadata(plan: DatasetPlan, encoder: Any, count: int, samples: int) -> None:
    import tensorflow_datasets as tfds

    lengths = [min(plan.shard_samples, samples - n * plan.shard_samples) for n in range(count)]
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=lengths,
        num_bytes=sum(plan.shard(n, count).stat().st_size for n in range(count)),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=plan.folder, dataset_name=plan.name, split=SPLIT, filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(plan.folder),
        features=encoder,
        split_infos=[split],
        check_data=False,
        description="Conversations about images and videos, written by `kangaroo data build`.",
    )


def fingerprint_of(files: Sequence[Path], extra: str = "") -> str:
    """A digest of the bytes of annotation files."""
    digest = hashlib.sha256(extra.encode())
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------- reading


class BuiltDataset:
    """Random access to the conversations of a dataset that `write_dataset` wrote."""

    def __init__(self, folder: str | Path, root: str = "") -> None:
        """Raises UserError if a shard is missing."""
        folder = Path(folder)
        info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        lengths = [int(n) for split in info["splits"] if split["name"] == SPLIT for n in split["shardLengths"]]
        plan = DatasetPlan(info["name"], folder.parent.parent, False, 0)
        self.files = [folder / plan.shard(n, len(lengths)).name for n in range(len(lengths))]
        missing = [file for file in self.files if not file.exists()]
        if missing:
            raise UserError(f"{missing[0]}: this shard is missing; run kangaroo data build again")
        self._root = root
        self._ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`; embedded media are members of the shard."""
        shard = next(n for n, end in enumerate(self._ends) if index < end)
        number = index - (self._ends[shard - 1] if shard else 0)
        file = str(self.files[shard])
        example = read_record(file, number)
        media = example["media"]
        rows = [{key: media[key][i] for key in media} for i in range(len(media["kind"]))]
        return Conversation(
            id=_text(example["id"]),
            turns=tuple(
                Turn(_text(role), _text(text), float(loss))
                for role, text, loss in zip(*(example["turns"][k] for k in ("role", "text", "loss")), strict=True)
            ),
            media=tuple(self._medium(row, f"{file}{MEMBER}{number}/{i}") for i, row in enumerate(rows)),
            language=_text(example["language"]),
        )

    def _medium(self, row: dict[str, Any], container: str) -> Media:
        path, options = _text(row["path"]), json.loads(_text(row["options"]))
        frames = tuple(json.loads(_text(row["frames"])))
        # The ending is kept: it tells images and animations from videos.
        where = f"{container}{member_suffix(path)}" if len(row["data"]) else join(self._root, path)
        return Media(_text(row["kind"]), where, frames=frames, **options)


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
