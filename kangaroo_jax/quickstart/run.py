"""`kangaroo quickstart`: trains a small Kangaroo, until it answers questions about unseen videos.

    corpus -> curation of raw clips -> tokenizer -> warm-up -> five stages, each evaluated -> chat
    -> export compared with PyTorch -> report.html, results.json

The recipe (`recipe`) says which of them there are. What warms up is a new decoder, or the new encoder of one that
speaks already. Every part leaves a marker in the workdir; running it again continues where it stopped.
"""

import contextlib
import dataclasses
import importlib.util
import json
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kangaroo_jax import machine
from kangaroo_jax.config import STAGES as OF_THE_PAPER
from kangaroo_jax.config import StageConfig
from kangaroo_jax.corpus.make import Corpus, make_corpus
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.answering import Answers
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.quickstart import ablations as quickstart_ablations
from kangaroo_jax.quickstart import curation as quickstart_curation
from kangaroo_jax.quickstart import encoder_warmup, judging, language
from kangaroo_jax.quickstart.evaluating import evaluate_stage
from kangaroo_jax.quickstart.recipe import ANSWERS_DTYPE, TINY, WARMUP, Recipe, Start
from kangaroo_jax.quickstart.report import write_quickstart_report
from kangaroo_jax.system.files import write_json
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training import curriculum

TORCH_QUESTIONS = 100  # questions that the exported model answers in PyTorch


class Clock:
    """Seconds of each part of the run, added up over restarts, in `seconds.json`."""

    def __init__(self, path: Path) -> None:
        """Read the seconds that an earlier run wrote to `path`."""
        self._path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside to part `name`, even if an exception ends it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)
            write_json(self._path, self.seconds)

    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())


def run(
    workdir: str | Path,
    *,
    recipe: Recipe = TINY,
    seed: int = 0,
    scale: float = 1.0,
    ablate: bool = False,
    dtype: str = "",
    tell: Tell = print,
) -> dict[str, Any]:
    """Run the whole pipeline of a recipe in `workdir`; returns the contents of `results.json`.

    Args:
        workdir: receives corpus/, curation/, the tokenizer or the decoder, a folder for each stage, report.html and
            results.json.
        recipe: what is trained, and on what.
        seed: determines the corpus, the weights and the order of samples.
        scale: size of the corpus and number of steps as a share of the usual ones; small for tests.
        ablate: afterwards train and evaluate the model without each part of the design.
        dtype: what training computes in, float32 or bfloat16; "" is the preset's. Answers are computed in float32.
        tell: prints a line.

    Raises:
        UserError: the workdir belongs to a run of another recipe, seed or scale, or the recipe lacks a package.
    """
    jax.devices()  # fails early if there are no devices
    workdir = Path(workdir).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    claim(
        workdir,
        {"seed": seed, "scale": scale}
        | ({} if recipe is TINY else {"recipe": recipe.name})
        | ({"dtype": dtype} if dtype else {}),
    )
    clock = Clock(workdir / "seconds.json")

    with clock.part("corpus"):
        words = judging.phrasings() if recipe.mixture.phrased else ()
        corpus = make_corpus(workdir / "corpus", seed, scale, mixture=recipe.mixture, phrasings=words, tell=tell)
    curated = None
    if recipe.curates:
        with clock.part("curation"):
            curated = quickstart_curation.curate_corpus(corpus, workdir / "curation", seed=seed, scale=scale, tell=tell)
    with clock.part("tokenizer" if recipe is TINY else "decoder"):
        start = recipe.start(workdir, corpus, tell)
    knows = {}
    spoken = OF_THE_PAPER[3:] if recipe.speaks else ()  # stages in which a decoder that knows something trains
    if recipe.speaks:
        with clock.part("language"):
            knows["before"] = language.measure(Path(start.init_from), workdir / "language_before.json", tell)

    def adjust(name: str, config: ConfigDict) -> None:
        shorten(config, scale)
        config.model.dtype = dtype or config.model.dtype
        if name in spoken:
            with clock.part("language"):
                reminders = language.remind(Path(start.init_from), workdir / "reminders.jsonl", scale, tell)
            config.data.train = (*config.data.train, str(reminders))
            config.data.weights = (1 - language.SHARE, language.SHARE)

    def after_stage(name: str, config: ConfigDict, folder: Path) -> None:
        clock_stage(clock, name, folder)
        if name != WARMUP:
            with clock.part(f"evaluate {name}"):
                evaluate_stage(name, folder, corpus, recipe, tell)
        if name in spoken:
            with clock.part("language"):
                knows[name] = language.measure(folder, folder / "language.json", tell)

    data = quickstart_curation.training_data(corpus, curated)
    learnt: dict[str, Any] = {}
    if recipe.encoder_steps:
        with clock.part("encoder"):
            start, learnt = warm_encoder_up(recipe, workdir, corpus, data, start, seed=seed, scale=scale, tell=tell)
    stages = curriculum.run(
        recipe.name,
        workdir,
        data=data,
        tokenizer=start.tokenizer,
        stages=recipe.stages,
        init_from=start.init_from,
        overrides={"seed": seed},
        adjust=adjust,
        after_stage=after_stage,
        tell=tell,
    )
    with clock.part("chat"):
        chats = chat_once(workdir, corpus, tell)
    judged = None
    if recipe.judges:
        with clock.part("judge"):
            judged = judging.judge(workdir, corpus, (OF_THE_PAPER[-2], OF_THE_PAPER[-1]), scale, tell)
    with clock.part("compare with PyTorch"):
        same = compare_with_torch(workdir, corpus, tell)
    results = collect(workdir, stages, clock)
    found = {"judged": judged, "language": knows, "encoder": learnt, "torch_chat": same}
    results |= {name: value for name, value in found.items() if value}
    write_json(workdir / "results.json", results)
    if ablate:
        results["ablations"] = quickstart_ablations.run(
            workdir, recipe, corpus, data, start, seed=seed, adjust=adjust, tell=tell
        )
        write_json(workdir / "results.json", results)
    write_report(workdir, recipe, corpus, results, chats, curated)
    tell(summary(results))
    tell(f"report: {workdir / 'report.html'}")
    tell(f"talk to it: {chat_command(workdir)}")
    return results


def write_report(
    workdir: Path,
    recipe: Recipe,
    corpus: Corpus,
    results: dict[str, Any],
    chats: list[dict[str, Any]],
    curated: quickstart_curation.Curated | None,
) -> None:
    """`report.html`: the recipe's page, with a section for each part of `results` that not every recipe has."""
    facts, sections = environment(), []
    if same := results.get("torch_chat"):
        facts["PyTorch answers as JAX"] = f"{same['same']} of {same['asked']} held-out questions"
    if learnt := results.get("encoder"):
        facts["words that the encoder knew before stage 1"] = f"{learnt['words_right']:.0%}"
    if judged := results.get("judged"):
        sections.append(judging.report_section(judged, results["stages"][-1]["short_mcq"]))
    if curated:
        sections.append(quickstart_curation.report_section(curated))
    if knows := results.get("language"):
        sections.append(language.report_section(knows))
    write_quickstart_report(workdir, recipe, corpus, results, chats, facts, sections)


def chat_command(workdir: Path) -> str:
    """The command to talk to the model; it works even if PATH lacks the `.venv` that a script made."""
    script = Path(sys.prefix, "bin/kangaroo")
    command = str(script) if script.exists() else "kangaroo"
    return shlex.join([command, "chat", f"--checkpoint={workdir}", "--video=FILE"])


def claim(workdir: Path, settings: dict[str, Any]) -> None:
    """Write the run's settings, or check that they equal those of the run that began here. Raises UserError."""
    path = workdir / "quickstart.json"
    if not path.exists():
        write_json(path, settings)
    found = json.loads(path.read_text())
    if found != settings:
        raise UserError(f"{workdir}: was begun with {found}, not {settings}; use another --workdir or those settings")


def warm_encoder_up(
    recipe: Recipe, workdir: Path, corpus: Corpus, data: Path, start: Start, *, seed: int, scale: float, tell: Tell
) -> tuple[Start, dict[str, Any]]:
    """(what the first stage begins with after the encoder's warm-up, what that reached)."""
    config = curriculum.stage(
        recipe.stages[0],
        recipe.name,
        data=data,
        tokenizer=start.tokenizer,
        init_from=start.init_from,
        overrides={"seed": seed},
    )
    target = workdir / "encoder"
    steps = scaled(recipe.encoder_steps, scale)
    found = encoder_warmup.warm_up(StageConfig.from_config(config), corpus.captions, target, steps, tell)
    return dataclasses.replace(start, init_from=str(target)), found


def shorten(config: ConfigDict, scale: float) -> None:
    """Scale a stage's number of steps."""
    config.train.steps = scaled(config.train.steps, scale)


def scaled(steps: int, scale: float) -> int:
    """A share of so many steps, at least two."""
    return max(2, round(steps * scale))


def clock_stage(clock: Clock, name: str, folder: Path) -> None:
    """Copy a stage's time from its own record, which adds up its restarts."""
    clock.seconds[name] = json.loads((folder / "done.json").read_text())["seconds"]


def chat_once(workdir: Path, corpus: Corpus, tell: Tell) -> list[dict[str, Any]]:
    """A chat of several rounds about a short and about a long held-out video."""
    path = workdir / "chat.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    model = Kangaroo.load(workdir / OF_THE_PAPER[-1], dtype=ANSWERS_DTYPE)
    chats = []
    for title, video, questions in corpus.chat_examples():
        history, turns = None, []
        for question in questions:
            answer, history = model.chat(video=video if history is None else None, query=question, history=history)
            turns += [["user", question], ["assistant", answer]]
            tell(f"{title}\n> {question}\n{answer}")
        chats.append({"title": title, "video": str(video), "turns": turns})
    write_json(path, chats)
    return chats


def compare_with_torch(workdir: Path, corpus: Corpus, tell: Tell) -> dict[str, int] | None:
    """Counts of equal answers of PyTorch and JAX for the exported last stage; None if torch is not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        tell(f"the export was not compared with PyTorch: {install_line('convert')} and run this again")
        return None
    path = workdir / "torch_chat.json"
    if not path.exists():
        from kangaroo_jax.quickstart.torch_answers import compare_chats

        asked = corpus.questions("short")[:TORCH_QUESTIONS]
        same = compare_chats(workdir / OF_THE_PAPER[-1], asked, tell=tell)
        write_json(path, {"asked": len(asked), "same": same})
    return json.loads(path.read_text(encoding="utf-8"))


def collect(workdir: Path, stages: list[dict[str, Any]], clock: Clock) -> dict[str, Any]:
    """`results.json`: seconds, peak_rss_gib, chance, and the stages."""
    rows = []
    for record in stages:
        if record["name"] == WARMUP:
            continue
        answers = Answers.from_json(json.loads((workdir / record["name"] / "eval.json").read_text(encoding="utf-8")))
        rows.append({**record, **{k: round(v, 4) for k, v in answers.metrics().items()}})
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = workdir / "results.json"
    earlier = json.loads(previous.read_text()).get("peak_rss_gib", 0.0) if previous.exists() else 0.0
    return {
        "seconds": round(clock.total(), 1),
        "peak_rss_gib": max(earlier, round(peak_kib / 2**20, 2)),
        "chance": 0.25,
        "stages": rows,
        "seconds_by_part": clock.seconds,
    }


def environment() -> dict[str, str]:
    """The machine and versions on which the figures were measured."""
    found = machine.facts()
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "av")
    return {
        "cores": str(found["cpus"]),
        "device": next(iter(found["devices"])),
        "python": found["python"],
        **{name: found["packages"][name] for name in packages},
    }


def summary(results: dict[str, Any]) -> str:
    """The table of stages, for the terminal."""
    keys = ("short_mcq", "long_mcq", "open_exact", "en_mcq", "zh_mcq")
    lines = [f"{'stage':24}" + "".join(f"{key:>12}" for key in keys)]
    for stage in results["stages"]:
        shares = [f"{stage[key]:.1%}" if key in stage else "not asked" for key in keys]
        lines.append(f"{stage['name']:24}" + "".join(f"{share:>12}" for share in shares))
    lines.append(
        f"chance {results['chance']:.0%}; {results['seconds'] / 60:.1f} minutes, {results['peak_rss_gib']} GiB"
    )
    return "\n".join(lines)
