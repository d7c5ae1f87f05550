"""Does the export compute what the checkpoint computes? Both are loaded and run on the same prompt.

The torch side goes from the exported folder alone: its own tokenizer, its own reading of the video, its own
model file. What is compared are token ids, then logits, then greedy answers.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.conventions import UserError
from kangaroo_jax.conversion.building import Tell
from kangaroo_jax.conversion.files import import_torch
from kangaroo_jax.conversion.sources import is_ours
from kangaroo_jax.data.video import IMAGE_SUFFIXES, load_media
from kangaroo_jax.inference.chat import Kangaroo, ask, conversation
from kangaroo_jax.inference.generate import NO_TOKEN, Generator, Prompts, bucket
from kangaroo_jax.models.kangaroo import Kangaroo as Model

LEAST_TOKENS = 600  # of the prompt: an error in the rotary embedding shows only far from the beginning
GREEDY = 32  # tokens of the answers that are compared, whatever ends them
QUESTION = "What happens in the video? "
FILLER = "Look at every frame, say what is in it, which way it moves, and when it comes and goes. "
TOLERANCE = 1e-4  # largest difference of logits, in float32, relative to the largest logit where that is above 1


@dataclasses.dataclass(frozen=True)
class Report:
    """How far apart two models are on one prompt."""

    tokens: int  # of the prompt, vision included
    vision_tokens: int
    largest_difference: float  # of logits
    largest_logit: float
    kl: float  # of the two distributions of the next token, mean over the prompt, nats
    same_greedy: int  # tokens of the answers that are equal, from the first on
    greedy: int  # tokens that were compared

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
        return (
            f"{self.tokens} tokens ({self.vision_tokens} of them vision): "
            f"logits differ by {self.largest_difference:.2e} at most "
            f"(relative {self.relative_difference:.2e}), KL {self.kl:.2e} nats, "
            f"{self.same_greedy} of {self.greedy} greedy tokens agree"
        )


def verify(
    checkpoint: str | Path,
    exported: str | Path,
    *,
    media: str | Path | None = None,
    query: str = QUESTION,
    tell: Tell = print,
) -> Report:
    """Compare a checkpoint of ours with a folder for PyTorch, in float32, on one prompt of at least 600 tokens.

    Args:
        checkpoint: what training or a conversion wrote.
        exported: folder in the format `hf`.
        media: video or image; by default a video made for the occasion.
        query: what is asked; made longer where the prompt is too short.
        tell: prints a line.

    Raises:
        UserError: torch is not installed, something cannot be read, or the two do not agree.
    """
    import_torch("the export is run in torch")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(media) if media is not None else make_video(Path(scratch) / "made.mp4")
        ours = _Ours(checkpoint)
        while len(ours.recipe(path, query).tokens) < LEAST_TOKENS:
            query += FILLER
        theirs = _Theirs(exported)
        here, answer_here, vision = ours.run(path, query)
        there, answer_there, ids = theirs.run(path, query)
        recipe = ours.recipe(path, query)
    if list(recipe.tokens) != ids:
        raise UserError(f"{exported}: its tokenizer gives other tokens for the same prompt")
    report = _compare(here, there, answer_here, answer_there, vision)
    tell(report.line())
    if not report.agrees:
        raise UserError(f"{exported} is not the same model as {checkpoint}: {report.line()}")
    return report


def pair(paths: Sequence[str | Path]) -> tuple[Path, Path]:
    """(checkpoint of ours, folder for PyTorch) of two paths. Raises UserError where they are not one of each."""
    ours = [Path(path) for path in paths if is_ours(Path(path))]
    exported = [Path(path) for path in paths if Path(path) not in ours and (Path(path) / "config.json").is_file()]
    if len(exported) != 1 or len(ours) != 1:
        raise UserError(
            f"--verify compares a checkpoint of ours with an export (hf), not {' and '.join(map(str, paths))}"
        )
    return ours[0], exported[0]


def _compare(
    here: np.ndarray, there: np.ndarray, answer_here: list[int], answer_there: list[int], vision: int
) -> Report:
    """Logits float32[T, V] of both, and both answers."""
    a, b = here.astype(np.float64), there.astype(np.float64)
    log_a = a - np.logaddexp.reduce(a, axis=-1, keepdims=True)
    log_b = b - np.logaddexp.reduce(b, axis=-1, keepdims=True)
    same = next((i for i, (x, y) in enumerate(zip(answer_here, answer_there, strict=False)) if x != y), None)
    longest = max(len(answer_here), len(answer_there))
    return Report(
        tokens=len(a),
        vision_tokens=vision,
        largest_difference=float(np.abs(a - b).max()),
        largest_logit=float(np.abs(a).max()),
        kl=float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean()),
        same_greedy=min(len(answer_here), len(answer_there)) if same is None else same,
        greedy=longest,
    )


class _Ours:
    """The checkpoint in JAX, computing in float32."""

    def __init__(self, checkpoint: str | Path) -> None:
        from kangaroo_jax.data.tokenizer import load_tokenizer
        from kangaroo_jax.training import checkpoint as checkpoints

        folder = checkpoints.find(checkpoint)
        self.config = ConfigDict(checkpoints.load_config(folder).to_dict())
        self.config.model.update(dtype="float32", attention="auto")
        binding = checkpoints.abstract_model(self.config.model)
        self.model = binding.bind(checkpoints.load_params(folder, binding))
        self.kangaroo = Kangaroo(self.model, self.config, load_tokenizer(checkpoints.find_tokenizer(folder)))

    def recipe(self, media: Path, query: str) -> Any:
        return self.kangaroo.recipe(conversation([_turn(media, query)]))

    def run(self, media: Path, query: str) -> tuple[np.ndarray, list[int], int]:
        """(logits float32[T, V], the greedy answer's ids, number of vision tokens)."""
        recipe = self.recipe(media, query)
        ref = recipe.media[0]
        clip = load_media(ref.path, ref.kind, image_size=self.config.data.image_size, times=ref.times, start=ref.start)
        generator = Generator(self.model)
        vision = generator.encode(clip.pixels, clip.times.astype(np.float32))
        prompts = Prompts.from_recipes([recipe], tokens=bucket(len(recipe.tokens)))
        logits = jax.jit(_logits, static_argnums=0)(*_split(self.model), prompts.tokens, prompts.vision_index, vision)
        (answer,) = generator.generate(prompts, vision, max_new_tokens=GREEDY, stop_ids=())
        return np.asarray(logits)[0, : len(recipe.tokens)], answer, int(recipe.is_vision.sum())


def _turn(media: Path, query: str) -> dict[str, Any]:
    is_image = media.suffix.lower() in IMAGE_SUFFIXES
    return ask(query, None if is_image else media, media if is_image else None)


def _split(model: Model) -> tuple[Any, Any]:
    from flax import nnx

    return nnx.split(model)


def _logits(graph: Any, weights: Any, tokens: jax.Array, vision_index: jax.Array, vision: jax.Array) -> jax.Array:
    from flax import nnx

    model: Model = nnx.merge(graph, weights)
    x = model.embed(tokens, vision_index, vision[None])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.llm.unembed(model.llm(x, jnp.ones_like(tokens), positions)[0])


class _Theirs:
    """The exported folder in PyTorch, in float32."""

    def __init__(self, exported: str | Path) -> None:
        torch = import_torch("the export is run in torch")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UserError("the export is run by transformers: pip install 'kangaroo-jax[convert]'") from None
        self._torch = torch
        options: dict[str, Any] = dict(trust_remote_code=True, local_files_only=True)
        with _quiet():
            self.model: Any = AutoModelForCausalLM.from_pretrained(str(exported), torch_dtype=torch.float32, **options)
            self.tokenizer = AutoTokenizer.from_pretrained(str(exported), **options)
        self.model.eval()

    def run(self, media: Path, query: str) -> tuple[np.ndarray, list[int], list[int]]:
        """(logits float32[T, V], the greedy answer's ids, the prompt's ids)."""
        config, kind = self.model.config, "image" if media.suffix.lower() in IMAGE_SUFFIXES else "video"
        processing = __import__(type(self.model).__module__, fromlist=["KangarooProcessor"])
        processor = processing.KangarooProcessor(config, self.tokenizer)
        content = [{"type": kind, kind: str(media)}, {"type": "text", "text": query}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}])
        with self._torch.no_grad():
            logits = self.model(**inputs, use_cache=False).logits[0].numpy()
            greedy: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, eos_token_id=NO_TOKEN)
            ids = self.model.generate(**inputs, max_new_tokens=GREEDY, **greedy)[0].tolist()
        prompt = inputs["input_ids"][0].tolist()
        return logits, ids[len(prompt) :], prompt

    def chat(self, media: Path, query: str, max_new_tokens: int) -> str:
        """The greedy answer, by the method that users call."""
        options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, do_sample=False)
        return self.model.chat(video_path=str(media), query=query, tokenizer=self.tokenizer, **options)[0]


class _quiet:
    """transformers without its progress bars and warnings."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        logging.enable_progress_bar()


def compare_chats(
    checkpoint: str | Path,
    videos_and_questions: Sequence[tuple[str | Path, str]],
    *,
    max_new_tokens: int = 16,
    tell: Tell = print,
) -> int:
    """Export a checkpoint, ask both PyTorch and JAX every question, and count the equal greedy answers.

    Args:
        checkpoint: folder that training wrote.
        videos_and_questions: (video or image file, question).
        max_new_tokens: longest answer.
        tell: prints a line, also for every question that the two answer differently.

    Returns:
        How many of the answers are equal, character for character.

    Raises:
        UserError: torch or transformers is not installed, or a file cannot be read.
    """
    import_torch("the export is run in torch")
    from kangaroo_jax.conversion.convert import convert

    with tempfile.TemporaryDirectory() as scratch:
        exported = convert([checkpoint], Path(scratch) / "export", format="hf", tell=lambda line: None)
        theirs = _Theirs(exported)
        kangaroo = Kangaroo.load(checkpoint)
        asked = [(Path(media), question) for media, question in videos_and_questions]
        conversations = [conversation([_turn(media, question)]) for media, question in asked]
        here = kangaroo.answer_many(conversations, max_new_tokens=max_new_tokens)
        same = 0
        for (media, question), answer in zip(asked, here, strict=True):
            there = theirs.chat(media, question, max_new_tokens)
            same += there == answer
            if there != answer:
                tell(f"{media.name}, {question!r}: JAX says {answer!r}, PyTorch {there!r}")
    tell(f"PyTorch and JAX give the same answer to {same} of {len(asked)} questions")
    return same


def make_video(path: Path, seconds: int = 24, side: int = 96, fps: int = 8) -> Path:
    """A video in which a square crosses the picture while the background grows brighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for i in range(seconds * fps):
            pixels = np.full((side, side, 3), 30 + 120 * i // (seconds * fps), np.uint8)
            left = i * (side * 3 // 4) // (seconds * fps)
            pixels[side // 3 : side * 2 // 3, left : left + side // 4] = (220, 40, 40)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
