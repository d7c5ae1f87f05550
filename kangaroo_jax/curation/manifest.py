"""What there is to curate: a folder of media, or the manifests of public datasets (JSONL, CSV, Parquet).

An item is a dictionary, as it goes through all stages and into the scores:

    id        a name made of the file's name and a hash of source, path, start and end
    path      local file or address; "" where a manifest names nothing that is here (`missing` says what)
    kind      "video" or "image"
    start, end    seconds of the file, None for its beginning and end
    caption, category, language, source, licence     text, "" where unknown
    source_id     as the manifest has it
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.image import IMAGE_SUFFIXES
from kangaroo_jax.data.storage import is_remote, join, member_suffix, short
from kangaroo_jax.errors import UserError
from kangaroo_jax.installing import install_line

Item = dict[str, Any]
VIDEO_SUFFIXES = (
    ".mp4",
    ".webm",
    ".mkv",
    ".mov",
    ".avi",
    ".m4v",
    ".flv",
    ".wmv",
    ".ts",
    ".mpg",
    ".mpeg",
    ".3gp",
    ".gif",
)
_MANIFESTS = (".jsonl", ".csv", ".tsv", ".parquet")
# Columns by what they mean, the first that a row has; those of WebVid (videoid, page_dir, contentUrl, name),
# Youku-mPLUG (video_id:FILE, golden_caption), LAION and COYO (url or URL, text or TEXT, key, hash) and Wukong (dir).
_COLUMNS = {
    "path": (
        "path",
        "video",
        "image",
        "media",
        "file",
        "video_path",
        "image_path",
        "video_id:FILE",
        "image:FILE",
        "dir",
    ),
    "url": ("url", "URL", "contentUrl", "image_url", "video_url"),
    "source_id": ("id", "videoid", "video_id", "image_id", "key", "hash", "SAMPLE_ID"),
    "caption": ("caption", "text", "TEXT", "name", "title", "golden_caption"),
    "category": ("category", "label", "class"),
    "language": ("language", "lang", "LANGUAGE"),
    "licence": ("licence", "license", "LICENSE"),
    "source": ("source", "dataset"),
    "start": ("start", "start_time", "begin"),
    "end": ("end", "end_time"),
    "kind": ("kind", "type"),
}


def read_inputs(inputs: Sequence[str], media_root: str = "", fetch: bool = False) -> list[Item]:
    """The items of folders and manifests, each once, ordered by id.

    Args:
        inputs: folders, media files, or manifests; `NAME=PATH` names the source, otherwise the file's stem does.
        media_root: folder or address that a manifest's paths start from; "" is its own folder.
        fetch: whether an http(s) address of a row is read where no local file is. Others (gs://, s3://) always are.

    Raises:
        UserError: an input is missing, empty, or a row of it cannot be read.
    """
    items: dict[str, Item] = {}
    for one in inputs:
        name, equals, path = one.partition("=")
        if not equals or os.path.exists(one):
            name, path = "", one
        for item in _items_of(path, name or Path(path).stem or "input", media_root, fetch):
            base, copies = item["id"], 1
            while item["id"] in items:  # the same row again: the later one is found to be a duplicate
                copies += 1
                item["id"] = f"{base}-{copies}"
            items[item["id"]] = item
    if not items:
        raise UserError(f"{', '.join(inputs)}: no video or image in it")
    return [items[key] for key in sorted(items)]


def _items_of(path: str, source: str, root: str, fetch: bool) -> Iterator[Item]:
    if os.path.isdir(path):
        yield from _folder(path, source)
    elif not os.path.exists(path):
        raise UserError(f"{path}: no such folder or file; --input names media, a folder of them, or a manifest")
    elif path.endswith(_MANIFESTS):
        for number, row in enumerate(_rows(path), start=1):
            yield _item(row, f"{path}, row {number}", source, root or os.path.dirname(path) or ".", fetch)
    elif path.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
        yield _named({"path": os.path.abspath(path), "source": source}, os.path.basename(path))
    else:
        raise UserError(f"{path}: neither a folder, a manifest ({', '.join(_MANIFESTS)}), a video nor an image")


def _folder(path: str, source: str) -> Iterator[Item]:
    """All media below a folder; a category is the name of the folder that a file lies in, if not `path` itself."""
    for folder, names, files in os.walk(path):
        names.sort()
        for file in sorted(files):
            if file.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
                full = os.path.join(folder, file)
                inner = os.path.relpath(full, path)
                category = "" if folder == path else os.path.basename(folder)
                yield _named({"path": os.path.abspath(full), "source": source, "category": category}, inner)


def _rows(path: str) -> Iterator[dict[str, Any]]:
    """Rows of a manifest. Raises UserError."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.endswith(".jsonl"):
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _json_row(line, f"{path}, line {number}")
            else:
                yield from csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is needed")
    return row


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: a Parquet file needs the package pyarrow: {install_line('curation')}") from None
    try:
        with pq.ParquetFile(path) as table:
            known = {name for names in _COLUMNS.values() for name in names} | {"page_dir", "videoid"}
            columns = [name for name in table.schema_arrow.names if name in known]
            for batch in table.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None


def _item(row: dict[str, Any], where: str, source: str, root: str, fetch: bool) -> Item:
    """The item of a manifest's row. Raises UserError."""
    meant: dict[str, Any] = {}
    for meaning, names in _COLUMNS.items():
        meant[meaning] = next((row[name] for name in names if row.get(name) not in (None, "")), "")
    address = str(meant.pop("url"))
    candidates = _candidates(row, str(meant["path"]), address)
    if not candidates:
        raise UserError(f"{where}: names no medium; it has the columns {', '.join(map(str, row))}")
    places = [join(root, candidate) for candidate in candidates]
    here = next((place for place in places if is_remote(place) or os.path.exists(place)), "")
    if is_remote(here) and here.startswith(("http://", "https://")) and not fetch:
        here = ""
    if not here and address and (fetch or not address.startswith(("http://", "https://"))) and is_remote(address):
        here = address
    item: Item = {key: str(meant[key]) for key in ("caption", "category", "language", "licence", "source_id", "kind")}
    item |= {"path": here if is_remote(here) or not here else os.path.abspath(here)}
    item["source"] = str(meant["source"] or source)
    item["start"], item["end"] = _seconds(meant["start"], where), _seconds(meant["end"], where)
    if not here:
        item["missing"] = f"no such file: {short(candidates[0])}" + (f" ({short(address)})" if address else "")
    return _named(item, candidates[0])


def _candidates(row: dict[str, Any], path: str, address: str) -> list[str]:
    """Where a row's medium may be, in the layouts of what is usually downloaded with."""
    places = [path] if path else []
    if video := row.get("videoid"):  # WebVid: by page folder, or all in one
        page = str(row.get("page_dir") or "")
        places += [f"{folder}{page}/{video}.mp4" for folder in ("videos/", "") if page]
        places += [f"videos/{video}.mp4", f"{video}.mp4"]
    if key := row.get("key"):  # img2dataset: 00000/000000012.jpg
        places += [f"{str(key)[:5]}/{key}.jpg", f"{key}.jpg"]
    if address:
        name = os.path.basename(address.partition("?")[0])
        places += [name] if name and not path else []
        places += [address] if is_remote(address) and not places else []
    return places


def _seconds(value: Any, where: str) -> float | None:
    """Seconds, from a number or `hh:mm:ss.s`. Raises UserError."""
    if value in (None, ""):
        return None
    try:
        parts = [float(part) for part in str(value).split(":")]
    except ValueError:
        raise UserError(f"{where}: {value!r} is no time; write seconds or hh:mm:ss") from None
    return sum(part * 60**i for i, part in enumerate(reversed(parts)))


def _named(item: Item, path: str) -> Item:
    """The item with an id that does not depend on where the folder lies, and with every key."""
    defaults: Item = dict.fromkeys(("caption", "category", "language", "licence", "source_id", "source", "kind"), "")
    item = defaults | {"start": None, "end": None} | item
    if item["kind"] not in ("video", "image"):
        still = member_suffix(path) in IMAGE_SUFFIXES and member_suffix(path) != ".gif"
        item["kind"] = "image" if still else "video"
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", os.path.splitext(os.path.basename(path))[0]).strip("-")[:40]
    # The caption belongs to what is told apart: of one medium, a dataset may have several.
    parts = (item["source"], path, str(item["start"]), str(item["end"]), item["source_id"], item["caption"])
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    return {"id": f"{stem}-{digest}" if stem else digest, **item}


def item_state(items: Iterable[Item]) -> str:
    """What the items are and the state of their files (size, time of change), as one hash."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True).encode())
        try:
            status = os.stat(item["path"])
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        except OSError:
            digest.update(b"absent")
    return digest.hexdigest()[:12]
