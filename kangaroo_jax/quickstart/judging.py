"""The quickstart judged as others judge models: in the words of benchmarks, by needles, and with controls.

A share of its instruction data speaks the words of published benchmarks (`phrasings`), so that the model's answers to
such a prompt mean something.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.corpus.make import Corpus, read_records
from kangaroo_jax.corpus.text import Phrasing
from kangaroo_jax.corpus.text import Question as Asked
from kangaroo_jax.evaluation.benchmarks.wording import WORDINGS
from kangaroo_jax.evaluation.report import heat_maps
from kangaroo_jax.evaluation.running import Loading, Settings, Share, evaluate_checkpoint
from kangaroo_jax.report.page import render
from kangaroo_jax.system.files import write_bytes, write_json
from kangaroo_jax.system.json_text import json_line
from kangaroo_jax.system.progress import Tell, silent

OFFICIAL = "video-mme"  # whose words the held-out questions are asked in, too
_CONTROLLED = 160  # held-out questions about short clips that are asked with controls
_A_LENGTH, _LENGTHS = 24, 9  # questions of the needles about a length, and lengths


def phrasings() -> tuple[Phrasing, ...]:
    """How benchmarks put a question with lettered options, each in its first style; no two are alike.

    The last asks when a needle appears, which is all that its words ask.
    """
    found = []
    for styles in WORDINGS.values():
        kinds = next(iter(styles.values()))
        wording = kinds.get("choice", kinds.get(""))
        if wording is None or wording.likelihood or "{letter}" not in wording.option:
            continue
        if wording.interleaved or "{subtitles}" in wording.text:
            continue
        if "{question}" in wording.text and "{options}" in wording.text:
            found.append(Phrasing(wording.text, wording.option, wording.system, wording.prefill))
    timed = next(iter(WORDINGS["needle-time"].values()))[""]
    asked, options, rest = timed.text.partition("\n{options}")
    found.append(Phrasing("{question}" + options + rest, timed.option, timed.system, timed.prefill, when=asked))
    return tuple(dict.fromkeys(found))


def judge(workdir: Path, corpus: Corpus, stages: tuple[str, str], scale: float, tell: Tell) -> dict[str, Any]:
    """What the two stages find of the needles, and of the second the controls and the score in a benchmark's words.

    Kept in `judged.json`; the answers and pages are in `judged/`. Returns {"needles": {stage: cells}, "official":
    share of right answers, "controls": {control: its score and what the question as it stands adds}}.
    """
    path = workdir / "judged.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    folder = workdir / "judged"

    def of(stage: str, benchmark: str, name: str, **keys: Any) -> dict[str, Any]:
        settings = Settings((benchmark,), str(folder), **keys)
        return evaluate_checkpoint(str(workdir / stage), settings, folder / name, Loading(), Share(), tell=silent)[0]

    folder.mkdir(exist_ok=True)
    limit = 0 if scale >= 1 else _A_LENGTH * max(1, round(_LENGTHS * scale))
    needles = {
        stage: of(stage, "needle", f"needles-{stage}", prompt="quickstart", limit=limit)["needles"] for stage in stages
    }
    questions = folder / f"{OFFICIAL}.jsonl"
    write_bytes(questions, b"".join(map(json_line, in_words(corpus))))
    official = of(stages[1], str(questions), OFFICIAL)["protocols"]["strict"]["score"]
    count = max(8, round(_CONTROLLED * scale))
    told = of(stages[1], str(corpus.eval_files["short"]), "controls", controls=True, limit=count)
    judged = {"needles": needles, "official": official, "controls": told["controls"]}
    write_json(path, judged)
    shown = ", ".join(f"{name} {one['score']:.0%}" for name, one in judged["controls"].items())
    tell(f"in the words of {OFFICIAL}: {official:.0%}; asked instead: {shown}")
    return judged


def in_words(corpus: Corpus) -> Iterator[dict[str, Any]]:
    """The held-out English questions about videos that have options, in the words of OFFICIAL."""
    wording = next(iter(WORDINGS[OFFICIAL].values()))[""]
    phrasing = Phrasing(wording.text, wording.option)
    for name in ("short", "long"):
        for record in read_records(corpus.eval_files[name]):
            if record["options"] and record["language"] == "en":
                text = record["conversations"][0]["value"].removeprefix("<video>\n")
                asked = Asked(record["question_kind"], "en", text, record["answer"], tuple(record["options"]))
                said = [{"from": "human", "value": f"<video>\n{phrasing.turn(asked)[0]}"}, record["conversations"][1]]
                place = str((corpus.folder / record["video"]).resolve())
                yield record | {"conversations": said, "video": place}


def report_section(judged: Mapping[str, Any], own: float) -> str:
    """A section of the quickstart's report (HTML): needles before and after the last stage, controls, words.

    `own`: share of right answers to the held-out questions on short clips in the corpus' own words.
    """
    controls = [
        (name, f"{one['score']:.0%}", f"{one['adds']:+.0%}", f"{one['adds_low']:+.0%} to {one['adds_high']:+.0%}")
        for name, one in judged["controls"].items()
    ]
    needles = [
        (f"{mode}, {stage.partition('_')[0]}", lengths, rows)
        for stage, cells in judged["needles"].items()
        for mode, lengths, rows in heat_maps(cells)
    ]
    lead = (
        f"Asked in the words of Video-MME's script, {judged['official']:.0%} of the held-out English questions about "
        f"videos are right; in the words of the corpus {own:.0%} about short clips."
    )
    return render("judged.html", lead=lead, needles=needles, controls=controls)
