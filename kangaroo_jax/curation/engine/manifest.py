"""The input of curation: folders of media, or manifests of public datasets (JSONL, CSV, Parquet).

An item is a dictionary that goes through all stages and into the scores:

    id        a name made of the file's name and a hash of source, path, start and end
    path      local file or address; "" if a manifest names no existing file (`missing` says what it names)
    kind      "video" or "image"
    start, end    seconds of the file, None for its beginning and end
    caption, category, language, source, licence     text, "" where unknown
    source_id     as the manifest has it
"""

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.media.addresses import WEB, check_scheme, is_remote, scheme_of, short
from kangaroo_jax.data.media.containers import member_suffix
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES
from kangaroo_jax.data.media.storage import absolute, join
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import json_lines, utf8

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
FOLDERS = ("stages", "scores", "keyframes", "timings", "clips", "export")  # folders that curation makes in its output
_MANIFESTS = (".jsonl", ".csv", ".tsv", ".parquet")
# Columns by meaning; the first that a row has is used. They include those of WebVid (videoid, page_dir, contentUrl,
# name), Youku-mPLUG (video_id:FILE, golden_caption), LAION and COYO (url, URL, text, TEXT, key, hash) and Wukong (dir).
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


def is_output(folder: str | Path) -> bool:
    """Whether a folder is the output of a finished or begun run of curation."""
    ends = all(os.path.exists(os.path.join(folder, name)) for name in ("funnel.json", "selected.jsonl"))
    return ends or os.path.exists(os.path.join(folder, "stages", "lock"))


def read_inputs(
    inputs: Sequence[str], media_root: str = "", fetch: bool = False, output: Path | None = None
) -> list[Item]:
    """The items of folders and manifests, each once, ordered by id.

    An unreadable row of a manifest is an item, too: it has no path, and `missing` says what is wrong with it.

    Args:
        inputs: folders, media files, or manifests; `NAME=PATH` names the source, otherwise the file's stem does.
        media_root: folder or address that a manifest's paths start from; "" is its own folder.
        fetch: whether a row's http(s) address is read if there is no local file. Others (gs://, s3://) always are.
        output: the folder to write. It is left out of input folders, as are outputs of other runs.

    Raises:
        UserError: an input is missing, empty, or an output of curation; or no row of a manifest can be read.
    """
    items: dict[str, Item] = {}
    for one in inputs:
        name, equals, path = one.partition("=")
        if not equals or os.path.exists(one):
            name, path = "", one
        _check_not_written(path, output)
        for item in _items_of(path, name or _name_of(path) or "input", media_root, fetch, output):
            base, copies = item["id"], 1
            while item["id"] in items:  # a repeated row gets another id and is later dropped as a duplicate
                copies += 1
                item["id"] = f"{base}-{copies}"
            items[item["id"]] = item
    if not items:
        raise UserError(f"{', '.join(inputs)}: no video or image in it")
    return [items[key] for key in sorted(items)]


def _check_not_written(path: str, output: Path | None) -> None:
    """Raise a UserError for an input that is an output of curation, or this run's output."""
    real = Path(os.path.realpath(path))
    inside = output is not None and output in real.parents and real.relative_to(output).parts[0] in FOLDERS
    if inside or (real.is_dir() and is_output(real)):
        raise UserError(f"{path}: was written by kangaroo curate; --input names the media that it was made of")
    if real == output:
        raise UserError(f"{path}: is the --output, too; give another, such as --output={os.path.join(path, 'curated')}")


def _name_of(path: str) -> str:
    """The name of a file or folder without its ending; bytes that are not UTF-8 are replaced."""
    return os.fsencode(Path(path).stem).decode("utf-8", "replace")


def _items_of(path: str, source: str, root: str, fetch: bool, output: Path | None) -> Iterator[Item]:
    if os.path.isdir(path):
        yield from _folder(path, source, output)
    elif not os.path.exists(path):
        raise UserError(f"{path}: no such folder or file; --input names media, a folder of them, or a manifest")
    elif path.endswith(_MANIFESTS):
        yield from _manifest(path, source, root or os.path.dirname(path) or ".", fetch)
    elif path.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
        yield _named({"path": absolute(path), "source": source}, os.path.basename(path))
    else:
        raise UserError(f"{path}: neither a folder, a manifest ({', '.join(_MANIFESTS)}), a video nor an image")


def _folder(path: str, source: str, output: Path | None) -> Iterator[Item]:
    """All media below a folder; the category is the name of the file's folder, unless that is `path` itself."""
    for folder, names, files in os.walk(path):
        inner = {name: os.path.join(folder, name) for name in names}
        written = {name for name, at in inner.items() if is_output(at) or os.path.realpath(at) == str(output)}
        names[:] = sorted(set(names) - written)
        for file in sorted(files):
            if file.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES) and not file.startswith("._"):  # macOS metadata
                full = os.path.join(folder, file)
                category = "" if folder == path else os.fsencode(os.path.basename(folder)).decode("utf-8", "replace")
                item = {"path": absolute(full), "source": source, "category": category}
                yield _named(item, os.path.relpath(full, path))


def _manifest(path: str, source: str, root: str, fetch: bool) -> Iterator[Item]:
    """The items of a manifest's rows, including unreadable ones. Raises UserError: all are unreadable."""
    bad, first, good = 0, "", 0
    for number, row in enumerate(_rows(path), start=1):
        where = f"{path}, row {number}: "
        try:
            if isinstance(row, UserError):
                where = ""
                raise row
            item, good = _item(row, source, root, fetch), good + 1
        except UserError as error:
            bad, reason = bad + 1, f"{where}{error}"
            first = first or reason
            item = _named({"path": "", "source": source, "missing": reason}, f"row {number}")
        yield item
    if bad and not good:
        raise UserError(first + (f" (and {bad - 1:,} rows like it)" if bad > 1 else ""))


def _rows(path: str) -> Iterator[dict[str, Any] | UserError]:
    """Rows of a manifest, each a dictionary or the error in it. Raises UserError."""
    if path.endswith(".parquet"):
        yield from _parquet_rows(path)
    elif path.endswith(".jsonl"):
        yield from (row for _, row in json_lines(path))
    else:
        yield from _csv_rows(path)


def _csv_rows(path: str) -> Iterator[dict[str, Any] | UserError]:
    """Rows of a CSV or TSV file. Paths may have bytes that are not UTF-8, as in the file system."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")
        while True:
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield UserError(f"{path}, line {reader.line_num}: not CSV ({error})")


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    from kangaroo_jax.data.media.tables import ParquetTable

    table = ParquetTable(path)
    known = {name for names in _COLUMNS.values() for name in names} | {"page_dir", "videoid"}
    yield from table.rows([name for name in table.schema.names if name in known])


def _item(row: dict[str, Any], source: str, root: str, fetch: bool) -> Item:
    """The item of a manifest's row. Raises UserError."""
    meant = {}
    for meaning, names in _COLUMNS.items():
        name = next((name for name in names if row.get(name) not in (None, "")), "")
        meant[meaning] = _text(row[name], name, meaning in ("path", "url")) if name else ""
    address = meant["url"]
    candidates = _candidates(row, meant["path"], address)
    if not candidates:
        raise UserError(f"names no medium; it has the columns {', '.join(map(str, row))}")
    places = [join(root, candidate) for candidate in candidates]
    location = next((place for place in places if is_remote(place) or os.path.exists(place)), "")
    if not location or is_remote(location):
        location = next((place for place in (location, address) if _may_be_read(place, fetch)), "")
    item: Item = {key: meant[key] for key in ("caption", "category", "language", "licence", "source_id", "kind")}
    item |= {"path": location if is_remote(location) or not location else absolute(location)}
    item["source"] = meant["source"] or source
    start, end = item["start"], item["end"] = _seconds(meant["start"]), _seconds(meant["end"])
    if end is not None and end <= (start or 0.0):
        raise UserError(f"its end {end:g} is not after its start {start or 0:g}")
    if not location:
        item["missing"] = f"no such file: {short(candidates[0])}" + (f" ({short(address)})" if address else "")
    return _named(item, candidates[0])


def _text(value: Any, name: str, is_path: bool) -> str:
    """A column's text; a path may be a name that is not UTF-8. Raises UserError."""
    if not isinstance(value, str | int | float):
        raise UserError(f"{name!r} must be text, found {type(value).__name__}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if not is_path and "\udc80" <= text[error.start] <= "\udcff":  # how Python decodes a byte that is not UTF-8
            raise UserError(f"{name!r} is not UTF-8 text") from None
        return text if is_path else text.encode("utf-8", "replace").decode()
    return text


def _may_be_read(address: str, fetch: bool) -> bool:
    """Whether an address may be read; web addresses need `fetch`. Raises UserError for an unknown scheme."""
    if not is_remote(address):
        return False
    check_scheme(address)
    return fetch or scheme_of(address) not in WEB


def _candidates(row: dict[str, Any], path: str, address: str) -> list[str]:
    """Paths where a row's medium may be, in the layouts of the usual download tools."""
    places = [path] if path else []
    if video := row.get("videoid"):  # WebVid: in page folders, or all in one folder
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


def _seconds(text: str) -> float | None:
    """Seconds, from a number or `hh:mm:ss.s`. Raises UserError."""
    if not text:
        return None
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = [math.nan]
    seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
    if not (all(part >= 0 for part in parts) and math.isfinite(seconds)):
        raise UserError(f"{short(repr(text), 40)} is no time; write seconds or hh:mm:ss")
    return seconds


def _named(item: Item, path: str) -> Item:
    """The item with every key, and with an id that does not depend on the folder's location."""
    defaults: Item = dict.fromkeys(("caption", "category", "language", "licence", "source_id", "source", "kind"), "")
    item = defaults | {"start": None, "end": None} | item
    if item["kind"] not in ("video", "image"):
        still = member_suffix(path) in IMAGE_SUFFIXES and member_suffix(path) != ".gif"
        item["kind"] = "image" if still else "video"
    stem = re.sub(r"[^A-Za-z0-9_]+", "-", os.path.splitext(os.path.basename(path))[0]).strip("-")[:40]
    # The caption is part of the key: one file may have several captions.
    parts = (item["source"], path, str(item["start"]), str(item["end"]), item["source_id"], item["caption"])
    digest = hashlib.sha256(utf8("\0".join(parts))).hexdigest()[:12]
    return {"id": f"{stem}-{digest}" if stem else digest, **item}


def item_state(items: Iterable[Item]) -> str:
    """A hash of the items and the state of their files (size, time of change)."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True).encode())
        try:
            status = os.stat(item["path"])
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        except OSError:
            digest.update(b"absent")
    return digest.hexdigest()[:12]
