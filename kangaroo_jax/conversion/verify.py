"""Checks that a model is the same after a conversion: both sides are loaded and run on the same prompt.

One side runs in JAX, the other in PyTorch from its own weights, config and tokenizer: a Kangaroo with the model file
and video reader that our exports ship, a bare Llama with transformers, a bare encoder with our vision tower. Code in a
folder is never run. The comparison covers token ids, then logits, then greedy answers; for an encoder, features.
"""

import dataclasses
import gc
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kangaroo_jax.conversion.files import import_torch
from kangaroo_jax.conversion.names import LAYOUTS
from kangaroo_jax.conversion.runners import InJax, InTorch, code_of, torch_features, turn
from kangaroo_jax.conversion.sources import WeightSource, open_source, special_ids
from kangaroo_jax.data.media.writing import write_h264
from kangaroo_jax.data.tokenizer import load_tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.history import conversation
from kangaroo_jax.system.progress import Tell

LEAST_TOKENS = 600  # length of the prompt: an error in the rotary embedding shows only far from the beginning
FRAMES = 4  # frames of the video for a bare encoder
QUESTION = "What happens in the video? "
FILLER = "Look at every frame, say what is in it, which way it moves, and when it comes and goes. "
TOLERANCE = 1e-4  # largest difference in float32, relative to the largest number if that is above 1
# Layouts that PyTorch can run, by part (whole model, decoder, encoder); the first available one is used.
RUN_BY_TORCH = {"": ("kangaroo",), "llm/": ("llama", "gguf", "kangaroo"), "vision/": ("eva", "timm", "kangaroo")}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The differences between two models on one prompt, or two encoders on some frames."""

    tokens: int  # tokens of the prompt, including vision tokens
    vision_tokens: int
    largest_difference: float  # between logits, or an encoder's features
    largest_logit: float  # largest magnitude of logits, or features
    kl: float = 0.0  # KL divergence of next-token distributions in nats, mean over the prompt
    same_greedy: int = 0  # equal tokens of the answers, up to the first difference
    greedy: int = 0  # compared tokens; 0 for an encoder

    @property
    def relative_difference(self) -> float:
        """The largest difference over the largest logit."""
        return self.largest_difference / max(self.largest_logit, 1e-30)

    @property
    def agrees(self) -> bool:
        """Whether the two are the same model."""
        close = self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)
        return close and self.same_greedy == self.greedy

    def line(self) -> str:
        """The report in words."""
        difference = f"by {self.largest_difference:.2e} at most (relative {self.relative_difference:.2e})"
        if not self.greedy:
            return f"{self.vision_tokens} vision tokens: features differ {difference}"
        return (
            f"{self.tokens} tokens ({self.vision_tokens} of them vision): logits differ {difference}, "
            f"KL {self.kl:.2e} nats, {self.same_greedy} of {self.greedy} greedy tokens agree"
        )


def verify(
    first: str | Path,
    second: str | Path,
    *,
    media: str | Path | None = None,
    query: str = QUESTION,
    preset: str = "kangaroo_8b",
    overrides: Mapping[str, Any] | None = None,
    tell: Tell = print,
) -> Comparison:
    """Compare the common parts of two paths in float32: whole models on a prompt of at least 600 tokens with a video,
    decoders on a text prompt, encoders on frames. Only one model is in memory at a time.

    Args:
        first, second: sources of `convert` in two layouts; PyTorch must be able to run one of them.
        media: video or image; by default a generated video.
        query: the question, repeated if the prompt would be too short.
        preset, overrides: see `convert`.
        tell: prints a line.

    Raises:
        UserError: torch is not installed, something cannot be read or run, or the two do not agree.
    """
    import_torch("the comparison is run in torch")
    part, ours, theirs = sides([open_source(path, preset, overrides) for path in (first, second)])
    tell(f"running {ours.path} in JAX, then {theirs.path} in PyTorch, in float32, by {code_of(theirs)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "torch"
        folder.mkdir()
        if part == "llm/":
            report = _compare_decoders(ours, theirs, query, folder)
        else:
            path = Path(media) if media is not None else make_video(Path(scratch) / "made.mp4")
            if part == "":
                report = _compare_chat(ours, theirs, path, query, folder)
            else:
                report = _compare_encoders(ours, theirs, path, folder)
    tell(f"{ours.path} ({ours.layout}, JAX) and {theirs.path} ({theirs.layout}, PyTorch): {report.line()}")
    if not report.agrees:
        raise UserError(f"{theirs.path} is not the same model as {ours.path}: {report.line()}")
    return report


def verify_all(sources: Sequence[str | Path], target: str | Path, **options: Any) -> list[Comparison]:
    """`verify` every source with the target. Raises UserError, see `verify`."""
    return [verify(source, target, **options) for source in sources]


def sides(sources: Sequence[WeightSource]) -> tuple[str, WeightSource, WeightSource]:
    """(the common part: "", "llm/" or "vision/", the source for JAX, the source for PyTorch). Raises UserError."""
    first, second = sources
    parts = {LAYOUTS.get(source.layout, ("",))[0] for source in sources} - {""}
    part = parts.pop() if parts else ""
    if parts:
        raise UserError(f"--verify: {first.path} ({first.layout}) and {second.path} ({second.layout}) share nothing")
    for layout in RUN_BY_TORCH[part]:
        for theirs, ours in ((second, first), (first, second)):
            if theirs.layout == layout:
                return part, ours, theirs
    wanted = [
        {"kangaroo": "hf"}.get(name, name) for name in RUN_BY_TORCH[part] if name != "gguf"
    ]  # which is not written
    raise UserError(
        f"--verify: PyTorch runs neither {first.path} ({first.layout}) nor {second.path} ({second.layout}): "
        f"one of them should be {' or '.join(wanted)}; convert it"
    )


def _compare_chat(ours: WeightSource, theirs: WeightSource, media: Path, query: str, scratch: Path) -> Comparison:
    in_jax = InJax(ours)
    kangaroo = in_jax.chat()
    while len((recipe := kangaroo.recipe(conversation([turn(media, query)]))).tokens) < LEAST_TOKENS:
        query += FILLER
    logits, answer = in_jax.answer(recipe)
    del in_jax, kangaroo
    gc.collect()
    torch_logits, torch_answer, ids = InTorch(theirs, scratch).answer(media, query)
    if list(recipe.tokens) != ids:
        raise UserError(f"{theirs.path}: its tokenizer gives other tokens for the same prompt")
    return _compare(logits, torch_logits, answer, torch_answer, int(recipe.is_vision.sum()))


def _compare_decoders(ours: WeightSource, theirs: WeightSource, query: str, scratch: Path) -> Comparison:
    ids, text = _text(ours, theirs, query)
    in_jax = InJax(ours)
    logits, answer = in_jax.continue_text(ids)
    del in_jax
    gc.collect()
    torch_side = InTorch(theirs, scratch)
    if text and torch_side.tokenizer is not None:
        found = torch_side.tokenizer.encode(text, add_special_tokens=False)
        if found != ids[len(ids) - len(found) :]:
            raise UserError(f"{theirs.path}: its tokenizer gives other tokens than {ours.tokenizer or ours.path}")
    torch_logits, torch_answer = torch_side.continue_text(ids)
    known = _decoders_own(ours, theirs)
    return _compare(logits[:, known], torch_logits[:, known], answer, torch_answer, 0)


def _decoders_own(*sides: WeightSource) -> np.ndarray:
    """The tokens that decoders alone give logits: not those added to one, nor the marks in a head that is tied."""
    models = [side.config.model for side in sides]
    marks = [mark for model in models if model.llm.tied_head for mark in special_ids(model)]
    return np.setdiff1d(np.arange(min(model.llm.vocab_size for model in models)), marks)


def _text(ours: WeightSource, theirs: WeightSource, query: str) -> tuple[list[int], str]:
    """(ids of a text prompt, the text); random ids and no text if there is no tokenizer beside the weights."""
    file = ours.tokenizer or theirs.tokenizer
    model = ours.config.model
    if file is None:
        known = np.setdiff1d(np.arange(model.llm.vocab_size), [*special_ids(model), model.special_ids.vision])
        return np.random.default_rng(0).choice(known, LEAST_TOKENS).tolist(), ""
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size > model.llm.vocab_size:
        raise UserError(f"{file}: {tokenizer.vocab_size} tokens, but the model knows {model.llm.vocab_size}")
    while len(ids := tokenizer.encode(query)) < LEAST_TOKENS:
        query += FILLER
    return [*tokenizer.prefix, *ids], query


def _compare_encoders(ours: WeightSource, theirs: WeightSource, media: Path, scratch: Path) -> Comparison:
    """Compare features. For an assembled model PyTorch resizes the file's position embedding, as JAX did before."""
    vision = ours.config.model.vision
    frames = _frames(media, vision.pos_embed_grid * vision.patch_size)
    jax_features = InJax(ours).features(frames).astype(np.float64)
    gc.collect()
    pytorch_features = torch_features(theirs, frames, scratch).astype(np.float64)
    tokens = jax_features.shape[0] * jax_features.shape[1]
    return Comparison(
        tokens, tokens, float(np.abs(jax_features - pytorch_features).max()), float(np.abs(jax_features).max())
    )


def _frames(media: Path, side: int) -> np.ndarray:
    """uint8[F, side, side, 3]: evenly spaced frames of a video, or an image."""
    from kangaroo_jax.data.media.image import IMAGE_SUFFIXES, load_image
    from kangaroo_jax.data.media.video import FramePolicy, load_video

    if media.suffix.lower() in IMAGE_SUFFIXES:
        return load_image(media, side)[None]
    return load_video(media, image_size=side, policy=FramePolicy().narrowed(nframes=FRAMES)).pixels


def _compare(
    here: np.ndarray, there: np.ndarray, answer_here: list[int], answer_there: list[int], vision: int
) -> Comparison:
    """Compare both logits float32[T, V], and both answers."""
    a, b = here.astype(np.float64), there.astype(np.float64)
    log_a = a - np.logaddexp.reduce(a, axis=-1, keepdims=True)
    log_b = b - np.logaddexp.reduce(b, axis=-1, keepdims=True)
    same = next((i for i, (x, y) in enumerate(zip(answer_here, answer_there, strict=False)) if x != y), None)
    longest = max(len(answer_here), len(answer_there))
    return Comparison(
        tokens=len(a),
        vision_tokens=vision,
        largest_difference=float(np.abs(a - b).max()),
        largest_logit=float(np.abs(a).max()),
        kl=float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean()),
        same_greedy=min(len(answer_here), len(answer_there)) if same is None else same,
        greedy=longest,
    )


def make_video(path: Path, seconds: int = 24, side: int = 96, fps: int = 8) -> Path:
    """A video in which a square crosses the picture while the background grows brighter."""
    count = seconds * fps

    def picture(i: int) -> np.ndarray:
        pixels = np.full((side, side, 3), 30 + 120 * i // count, np.uint8)
        left = i * (side * 3 // 4) // count
        pixels[side // 3 : side * 2 // 3, left : left + side // 4] = (220, 40, 40)
        return pixels

    return write_h264(path, map(picture, range(count)), fps)
