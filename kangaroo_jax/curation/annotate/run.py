"""`kangaroo annotate`: clips -> captions.jsonl and refined.jsonl, in parts that survive a kill."""

import asyncio
import collections
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate.captioning import Captioner, FrameCaptions
from kangaroo_jax.curation.annotate.choose import choose, rule_size
from kangaroo_jax.curation.annotate.files import ClipRecord, read_clips, write_lines
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.cache import ReplyCache
from kangaroo_jax.llm_client.estimate import Estimate, told
from kangaroo_jax.llm_client.ordered import in_order
from kangaroo_jax.llm_client.prompts import check_language
from kangaroo_jax.llm_client.requests import Reply, canonical, key_of
from kangaroo_jax.llm_client.team import Clients
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.json_text import read_objects
from kangaroo_jax.system.progress import Progress, Tell


def annotate_clips(
    source: Path, output: Path, config: ConfigDict, *, dry_run: bool = False, tell: Tell = print
) -> None:
    """Annotate the clips of a file.

    Args:
        source: one clip a line, as `kangaroo curate select` writes them.
        output: folder for captions.jsonl, refined.jsonl, annotation.json (counts) and cache.sqlite.
        config: `config.annotation_config`.
        dry_run: only print the number of calls and tokens and their cost; nothing is asked or written.

    Raises:
        UserError: a clip, the config or a backend is wrong, an endpoint cannot be reached, or no caption is ok.
    """
    for language in (*config.languages, config.frame_language):
        check_language(language)
    if not config.captioners or not config.languages or config.part_clips < 1:
        raise UserError("annotate: config.captioners, config.languages and config.part_clips must be at least one each")
    clips = read_clips(source)
    if dry_run:
        tell(told(estimate(clips, output, config)))
        return
    cache = ReplyCache(output / "cache.sqlite")
    try:
        asyncio.run(_annotate(clips, output, config, cache, tell))
    finally:
        cache.close()


async def _annotate(
    clips: Sequence[ClipRecord], output: Path, config: ConfigDict, cache: ReplyCache, tell: Tell
) -> None:
    team = Clients(config.backends, (*config.captioners, config.writer), cache)
    captioner = Captioner(config, team)
    try:
        parts = _plan(clips, output, captioner)
        wanted = {"parts": [path.name for path, _ in parts], "choose": config.choose.to_dict()}
        mark = hashlib.sha256(canonical(wanted).encode()).hexdigest()
        if (before := _finished(output, mark)) is not None:
            bad = before["captions"] - before["outcomes"]["ok"]
            tell(f"{output}: finished already{f', {bad:,} captions are not ok' if bad else ''}; nothing to do")
            return
        rows, missing = await _parts(parts, captioner, output, tell, len(clips))
    finally:
        await team.close()
    summary, reason = _finish(rows, len(clips), output, config)
    summary |= {"prompts": captioner.prompts, "this_run": team.summary(), "all_runs": cache.totals()}
    good = summary["outcomes"].get("ok", 0)
    if good and not missing:
        summary["finished"] = mark
    write_json(output / "annotation.json", summary)
    tell(_last_line(summary, output))
    if not missing:
        shutil.rmtree(output / "parts", ignore_errors=True)
    if not good:
        raise UserError(
            f"annotate: none of the {summary['captions']:,} captions is ok, the first because of {reason}; "
            f"{_advice(missing)}; see {output / 'captions.jsonl'}"
        )
    for line in _remarks(summary, missing, reason, config):
        tell(line)


def _remarks(summary: dict[str, Any], missing: int, reason: str, config: ConfigDict) -> Iterator[str]:
    """Lines about captions that are not ok and clips that were not chosen."""
    outcomes, rules = summary["outcomes"], config.choose
    if bad := summary["captions"] - outcomes["ok"]:
        yield f"{bad:,} captions are not ok, the first because of {reason}; {_advice(missing)}"
    if summary["refined_clips"] == rule_size(summary["clips"], rules) < summary["clips"]:
        names = ("count",) if rules.count else ("share", "at_least")
        rule = " and ".join(f"choose.{name}={rules[name]:g}" for name in names)
        yield (
            f"{summary['refined_clips']:,} of {summary['clips']:,} clips chosen for refined.jsonl by {rule}; "
            "--config.choose.share=1 keeps all that are ok"
        )


def _advice(missing: int) -> str:
    """What to do about captions that are not ok."""
    if missing:
        return f"{missing:,} clips met errors that may pass: run the same command again to retry them"
    return (
        "the same command would meet the same: another model, or a temperature "
        "(--config.backends.NAME.temperature=0.7), may do better"
    )


def _plan(clips: Sequence[ClipRecord], output: Path, captioner: Captioner) -> list[tuple[Path, Sequence[ClipRecord]]]:
    """Parts and their files. A file's name has a hash of everything that its contents depend on."""
    assert captioner.team is not None
    config = captioner.config
    settings = {key: config[key] for key in ("languages", "frame_tokens", "caption_tokens", "source_caption")}
    common = [captioner.team.identity(), captioner.prompts, settings, config.refine.to_dict()]
    common.append([list(config.captioners), config.writer])
    parts, size = [], config.part_clips
    for first in range(0, len(clips), size):
        part = clips[first : first + size]
        images = [_state(frame.path) for clip in part for frame in clip.keyframes]
        parts_of_name = [common, [clip.row for clip in part], images]
        digest = hashlib.sha256(canonical(parts_of_name).encode()).hexdigest()[:12]
        parts.append((output / "parts" / f"{first // size:05d}-{digest}.jsonl", part))
    return parts


def _state(path: str) -> list[Any]:
    """A file's path, size and modification time, by which changes are noticed."""
    try:
        found = os.stat(path)
    except OSError:
        return [path]
    return [path, found.st_size, found.st_mtime_ns]


def _finished(output: Path, mark: str) -> dict[str, Any] | None:
    """The contents of annotation.json if all files are there and come from exactly these inputs."""
    try:
        summary = json.loads((output / "annotation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    complete = all((output / name).is_file() for name in ("captions.jsonl", "refined.jsonl"))
    complete &= bool(summary.get("outcomes", {}).get("ok"))
    return summary if complete and summary.get("finished") == mark else None


async def _parts(
    parts: Sequence[tuple[Path, Sequence[ClipRecord]]], captioner: Captioner, output: Path, tell: Tell, clips: int
) -> tuple[list[Path | list[dict[str, Any]]], int]:
    """Annotate the missing parts. Returns files in order, or rows if a part has clips to ask again.

    Also returns the number of clips with a transient error.
    """
    assert captioner.team is not None
    progress = Progress("", clips, "clips", tell, more=captioner.team.line)
    results: list[Path | list[dict[str, Any]]] = []
    missing = 0
    for path, part in parts:
        if path.is_file():
            progress.add(len(part), skipped=True)
            results.append(path)
            continue
        made = await in_order(lambda clip: captioner.annotate(clip, output), part, _at_once(captioner), progress.add)
        rows = [row for of_clip in made for row in of_clip]
        again = {row["clip"] for row in rows if row.get("transient")}
        missing += len(again)
        if not again:
            write_lines(path, rows)
        results.append(rows if again else path)
    progress.finish()
    return results, missing


def _at_once(captioner: Captioner) -> int:
    """The number of clips in flight: enough to keep every backend at its concurrency twice over."""
    assert captioner.team is not None
    most = max(client.limits.concurrency for client in captioner.team.clients.values())
    return max(4, 2 * -(-most // 5))


def _rows_of(results: Sequence[Path | list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for part in results:
        if isinstance(part, Path):
            yield from read_objects(part)
        else:
            yield from part


def _finish(
    results: Sequence[Path | list[dict[str, Any]]], clips: int, output: Path, config: ConfigDict
) -> tuple[dict[str, Any], str]:
    """Write captions.jsonl and refined.jsonl; returns their counts and the reason of the first failed caption."""
    first = ""

    counts: dict[str, collections.Counter[str]] = {
        name: collections.Counter() for name in ("outcomes", "reasons", "dropped_sentences", "categories", "chosen")
    }

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal first
        for row in _rows_of(results):
            counts["outcomes"][row["outcome"]] += 1
            counts["categories"][row["category"]] += 1
            counts["dropped_sentences"].update(one["rule"] for one in row.get("dropped", ()))
            if row["reason"]:
                first = first or f"{row['outcome']} ({row['reason']})"
                counts["reasons"][row["reason"].split(":")[0]] += 1
            yield row

    captions = write_lines(output / "captions.jsonl", counted())
    chosen = choose(_rows_of(results), clips, config.choose)

    def refined() -> Iterator[dict[str, Any]]:
        for row in _rows_of(results):
            if row["clip"] in chosen:
                counts["chosen"][row["category"]] += 1
                yield row

    refined_rows = write_lines(output / "refined.jsonl", refined())
    summary = {
        "clips": clips,
        "captions": captions,
        "refined_clips": len(chosen),
        "refined_captions": refined_rows,
    }
    return summary | {name: dict(sorted(counter.items())) for name, counter in counts.items()}, first


def _last_line(summary: dict[str, Any], output: Path) -> str:
    outcomes = ", ".join(f"{count:,} {name}" for name, count in summary["outcomes"].items())
    return (
        f"{summary['captions']:,} captions of {summary['clips']:,} clips ({outcomes}); {summary['refined_clips']:,} "
        f"clips chosen; see {output / 'captions.jsonl'}, refined.jsonl and annotation.json"
    )


# --------------------------------------------------------------------------------- estimate


def estimate(clips: Sequence[ClipRecord], output: Path, config: ConfigDict) -> dict[str, Any]:
    """Requests, calls not answered by the cache, tokens and cost, per backend and in total.

    The writer's prompts are estimated with frame captions of the usual length, and none of its answers count as
    cached, because the frame captions are not known yet. Models of this process are not loaded.
    """
    captioner, sums = Captioner(config), Estimate(config.backends)
    kept = _kept(config, output)
    usual = Reply("ok", " ".join(["word"] * round(config.frame_tokens / 3)))
    for clip in clips:
        requests = captioner.frame_requests(clip)
        for name in config.captioners:
            sums.add(name, requests, kept=sum(kept(name, request) for request in requests))
        frames = [FrameCaptions(frame.time, (usual,) * len(config.captioners)) for frame in clip.keyframes]
        sums.add(config.writer, [captioner.video_request(clip, frames, language) for language in config.languages])
    return sums.result()


def _kept(config: ConfigDict, output: Path) -> Callable[[str, Any], bool]:
    """A function that says whether the cache has an endpoint's answer to a request."""
    path = output / "cache.sqlite"
    if not path.is_file():
        return lambda name, request: False
    cache = ReplyCache(path)
    names = [name for name in config.captioners if config.backends[name].kind == "endpoint"]
    team = Clients(config.backends, names)

    def kept(name: str, request: Any) -> bool:
        if name not in team.clients:
            return False
        try:
            images = tuple(Path(image).read_bytes() for image in request.images)
        except OSError:
            return False
        return cache.get(key_of(team[name].backend, request, images)) is not None

    return kept
