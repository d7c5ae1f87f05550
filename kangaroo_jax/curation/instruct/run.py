"""`kangaroo instruct`: captions -> an instruction set in the paper's mix, and the reasons of dropped ones."""

import asyncio
import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate.files import write_lines
from kangaroo_jax.curation.instruct.checks import normal
from kangaroo_jax.curation.instruct.making import Maker, MakingResult
from kangaroo_jax.curation.instruct.plan import CaptionRow, Cell, PlannedConversation, cells_of, slots, targets
from kangaroo_jax.curation.instruct.records import is_image, schema, sound, to_records
from kangaroo_jax.curation.instruct.taxonomy import CAPTION_TASKS
from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.cache import ReplyCache
from kangaroo_jax.llm_client.estimate import Estimate, told
from kangaroo_jax.llm_client.ordered import in_order
from kangaroo_jax.llm_client.requests import canonical
from kangaroo_jax.llm_client.team import Clients
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.json_text import read_lines
from kangaroo_jax.system.progress import Progress, Tell

AT_ONCE = 64  # conversations in flight
FULL = "share of its task is full"  # the reason of a good conversation that is dropped
OUTPUTS = ("instruct.jsonl", "instruct_dropped.jsonl", "instruct.json", "instruct_schema.json")


def make_instructions(
    source: Path, output: Path, config: ConfigDict, *, dry_run: bool = False, tell: Tell = print
) -> None:
    """Make an instruction set from the captions of a file.

    Args:
        source: captions.jsonl or refined.jsonl of `kangaroo annotate`.
        output: folder for instruct.jsonl (LLaVA records), instruct_dropped.jsonl, instruct.json (counts) and
            instruct_schema.json.
        config: `config.instruct_config`.
        dry_run: only print the number of calls and tokens and their cost.

    Raises:
        UserError: the captions, the config or a backend is wrong, an endpoint cannot be reached, or nothing was made.
    """
    cells = cells_of(config)
    if not 2 <= config.options <= 8 or not 2 <= config.min_rounds <= config.max_rounds <= 8:
        raise UserError("instruct: config.options must be 2 to 8, and 2 <= min_rounds <= max_rounds <= 8")
    if any(task not in CAPTION_TASKS for task, _ in cells) and not config.generator:
        raise UserError("instruct: config.generator must name a backend, as config.shares has questions")
    rows = read_captions(source, config)
    if dry_run:
        tell(told(estimate(rows, cells, source.parent, config)))
        return
    cache = ReplyCache(output / "cache.sqlite")
    try:
        asyncio.run(_instruct(rows, cells, source, output, config, cache, tell))
    finally:
        cache.close()


def read_captions(source: Path, config: ConfigDict) -> list[CaptionRow]:
    """The captions that are ok and have at least `min_score`. Raises UserError, also if there are none."""
    rows: list[CaptionRow] = []
    for where, row in read_lines(source):
        if not all(isinstance(row.get(key), str) for key in ("id", "clip", "language", "media", "outcome")):
            raise UserError(f"{where}: no object of captions.jsonl (id, clip, language, media, outcome)")
        if row["outcome"] == "ok" and _score(row, where) >= config.min_score:
            rows.append(row)
    if not rows:
        raise UserError(f"{source}: no caption in it is ok and has a score of at least {config.min_score:g}")
    return rows


def _score(row: CaptionRow, where: str) -> float:
    """The score of a caption that is ok. Raises UserError if the row is malformed."""
    scores = row.get("scores")
    score = scores.get("score") if isinstance(scores, dict) else None
    if not isinstance(score, int | float) or not all(isinstance(row.get(key), str) for key in ("caption", "short")):
        raise UserError(f"{where}: a caption that is ok has texts 'caption' and 'short', and a number scores.score")
    return score


async def _instruct(
    rows: Sequence[CaptionRow],
    cells: Mapping[Cell, float],
    source: Path,
    output: Path,
    config: ConfigDict,
    cache: ReplyCache,
    tell: Tell,
) -> None:
    asks = [name for name in (config.generator, config.blind, config.verifier) if name]
    team = Clients(config.backends, asks if any(task not in CAPTION_TASKS for task, _ in cells) else [], cache)
    maker = Maker(config, source.parent, team)
    try:
        mark = _mark(source, output, config, maker, team)
        if _finished(output, mark):
            tell(f"{output}: finished already; nothing to do")
            return
        kept, dropped = await build(rows, cells, maker, tell)
    finally:
        await team.close()
    generator = team[config.generator].backend.model if config.generator in team.clients else ""
    records = to_records(kept, maker, source.parent, output, generator)
    again = sum(1 for one in dropped if one.transient)
    summary = counts_of(records, dropped, cells) | {"this_run": team.summary(), "all_runs": cache.totals()}
    summary |= {"prompts": maker.versions} | ({} if again else {"finished": mark})
    write_lines(output / OUTPUTS[1], (_dropped(one) for one in dropped))
    write_json(output / OUTPUTS[3], schema())
    write_lines(output / OUTPUTS[0], records)
    if not records:
        summary.pop("finished", None)
    write_json(output / OUTPUTS[2], summary)
    tell(_last_line(summary, output))
    may_pass = f"{again:,} conversations met errors that may pass: run the same command again to retry them"
    if not records:
        raise UserError(
            f"instruct: no conversation was made{_why_none(dropped, cells)}{f'; {may_pass}' if again else ''}"
        )
    if again:
        tell(may_pass)


def _why_none(dropped: Sequence[MakingResult], cells: Mapping[Cell, float]) -> str:
    """Why there is no conversation: with `keep_shares` a task without one empties all, or most were dropped."""
    got = {(one.slot.task, one.slot.language) for one in dropped if one.reason == FULL}
    without = ", ".join(f"{task}_{language}" for task, language in cells if (task, language) not in got)
    reasons = collections.Counter(f"{one.reason} ({one.detail})" if one.detail else one.reason for one in dropped)
    reasons.pop(FULL, None)
    common = f"; most often dropped: {reasons.most_common(1)[0][0][:300]}" if reasons else ""
    if got:
        return f": there is none of {without}, and shares are kept (--config.keep_shares=False does not){common}"
    return common or ": the captions are in none of the languages of config.shares"


def _mark(source: Path, output: Path, config: ConfigDict, maker: Maker, team: Clients) -> str:
    """A hash of everything that the output depends on."""
    settings = config.to_dict()
    settings.pop("backends")
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    where = str(source.parent.resolve()), str(output.resolve())
    return hashlib.sha256(canonical([digest, where, settings, maker.versions, team.identity()]).encode()).hexdigest()


def _finished(output: Path, mark: str) -> bool:
    try:
        summary = json.loads((output / OUTPUTS[2]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return summary.get("finished") == mark and all((output / name).is_file() for name in OUTPUTS)


# ------------------------------------------------------------------------------------ making


async def build(
    rows: Sequence[CaptionRow], cells: Mapping[Cell, float], maker: Maker, tell: Tell
) -> tuple[list[MakingResult], list[MakingResult]]:
    """Make conversations until every share is filled or its captions are used up. Returns (kept, dropped).

    It works in rounds: the next captions in the plan replace the conversations that a round drops, so that the
    result does not depend on which answer came first.
    """
    config = maker.config
    wanted = targets(cells, config.samples)
    plans = {cell: _fitting(slots(cell, rows, config)) for cell in cells}
    kept: dict[Cell, list[MakingResult]] = {cell: [] for cell in cells}
    dropped: list[MakingResult] = []
    asked: set[tuple[str, str, str]] = set()
    progress = Progress("", 0, "conversations", tell, more=maker.team.line if maker.team else str)
    while True:
        batch = [
            slot for cell in cells for slot in itertools.islice(plans[cell], max(wanted[cell] - len(kept[cell]), 0))
        ]
        if not batch:
            break
        progress.expect(len(batch))  # the captions may allow fewer than were asked for
        for made in _not_twice(await in_order(maker.make, batch, AT_ONCE, progress.add), asked):
            if made.reason:
                dropped.append(made)
            else:
                kept[made.slot.task, made.slot.language].append(made)
    progress.finish()
    cut = _same_shares(kept, wanted) if config.keep_shares else []
    return [made for of_cell in kept.values() for made in of_cell], dropped + cut


def _fitting(plan: Iterator[PlannedConversation]) -> Iterator[PlannedConversation]:
    """The slots that fit their medium: images are only captioned, as the questions are about videos."""
    return (slot for slot in plan if slot.task in CAPTION_TASKS or not is_image(slot.row))


def _not_twice(found: Sequence[MakingResult], asked: set[tuple[str, str, str]]) -> Iterator[MakingResult]:
    """The results; one that repeats a clip's first question, or has media tags in its text, is marked as dropped."""
    for made in found:
        if made.reason or made.slot.task in CAPTION_TASKS:
            yield made
            continue
        key = (made.slot.row["clip"], made.slot.task, normal(made.rounds[0][0]))
        if not sound([made]):
            made = dataclasses.replace(made, reason="tag of a medium", detail=made.rounds[0][0])
        elif key in asked:
            made = dataclasses.replace(made, reason="asked before", detail=made.rounds[0][0])
        asked.add(key)
        yield made


def _same_shares(kept: dict[Cell, list[MakingResult]], wanted: Mapping[Cell, int]) -> list[MakingResult]:
    """Cut every task to the share of its target that the least filled one reached; returns what is cut."""
    reached = min((len(kept[cell]) / count for cell, count in wanted.items() if count), default=1.0)
    cut = []
    for cell, count in wanted.items():
        most = round(reached * count)
        cut += [dataclasses.replace(one, reason=FULL) for one in kept[cell][most:]]
        del kept[cell][most:]
    return cut


def _dropped(made: MakingResult) -> dict[str, Any]:
    slot = made.slot
    found = {"id": slot.id, "caption": slot.row["id"], "task": slot.task, "language": slot.language}
    found |= {"types": list(slot.types), "reason": made.reason, "detail": made.detail}
    return found | {"rounds": [list(pair) for pair in made.rounds], "checks": dict(made.checks)}


def counts_of(
    records: Sequence[Mapping[str, Any]], dropped: Sequence[MakingResult], cells: Mapping[Cell, float]
) -> dict[str, Any]:
    """Counts by task, language, type and letter; shares beside their targets; the reasons of dropped ones."""
    made = collections.Counter((record["task"], record["language"]) for record in records)
    total, of_target = max(len(records), 1), sum(cells.values())
    shares = {
        f"{task}_{language}": {
            "count": made[task, language],
            "share": round(made[task, language] / total, 4),
            "target": round(share / of_target, 4),
        }
        for (task, language), share in cells.items()
    }
    counters = {
        "languages": collections.Counter(record["language"] for record in records),
        "types": collections.Counter(key for record in records for key in record["types"]),
        "letters": collections.Counter(record["answer"] for record in records if "answer" in record),
        "dropped": collections.Counter(one.reason for one in dropped),
    }
    return {"conversations": len(records), "shares": shares} | {n: dict(sorted(c.items())) for n, c in counters.items()}


def _last_line(summary: Mapping[str, Any], output: Path) -> str:
    dropped = sum(summary["dropped"].values())
    languages = ", ".join(f"{count:,} {language}" for language, count in summary["languages"].items())
    return f"{summary['conversations']:,} conversations ({languages}), {dropped:,} dropped; see {output / OUTPUTS[0]}"


# --------------------------------------------------------------------------------- estimate


def estimate(
    rows: Sequence[CaptionRow], cells: Mapping[Cell, float], folder: Path, config: ConfigDict
) -> dict[str, Any]:
    """Requests, tokens and cost of the first round, as if nothing were dropped; the cache is not consulted."""
    maker, sums = Maker(config, folder), Estimate(config.backends)
    for cell, count in targets(cells, config.samples).items():
        if cell[0] in CAPTION_TASKS:
            continue
        for slot in itertools.islice(_fitting(slots(cell, rows, config)), count):
            sums.add(config.generator, [maker.question_request(slot)])
            usual = ("word " * 12, "word " * 4)
            made = MakingResult(slot, (usual,) * max(len(slot.types), 1), ("word " * 4,) * (config.options - 1))
            if cell[0] == "mcq":
                checks = maker.choice_requests(made)
                if config.blind:
                    sums.add(config.blind, checks)
                if config.verifier:
                    sums.add(config.verifier, [maker.question_request(slot)])
            elif config.blind and config.blind_open:
                sums.add(config.blind, maker.choice_requests(made)[:1], times=len(made.rounds))
    return sums.result()
