"""Runs a checkpoint in JAX or PyTorch and returns logits, answers or features to compare.

The torch side reads the files independently, by the names in them, and never runs code that comes with them: the models
are those of transformers and of this package.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints.stored import whole
from kangaroo_jax.config import StageConfig
from kangaroo_jax.conversion import formats, names
from kangaroo_jax.conversion.export import CODE, CODE_FILES
from kangaroo_jax.conversion.files import import_torch, open_model, open_tensors, unwrapped
from kangaroo_jax.conversion.sources import WeightSource, table_for
from kangaroo_jax.data.media.image import IMAGE_SUFFIXES
from kangaroo_jax.data.media.video import MediaRef, load_media
from kangaroo_jax.data.tokenizer import tokenizer_files
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.chat import Kangaroo
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.given import Given
from kangaroo_jax.inference.history import ask
from kangaroo_jax.inference.programs import Programs
from kangaroo_jax.inference.requests import Request
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.models.kangaroo import KangarooModel as Model
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.json_text import read_json

GREEDY = 32  # tokens of each answer that are compared, without stop tokens
# timm's names -> EVA's names: kept apart from the table of names, which the comparison tests.
FROM_TIMM = (
    (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
    (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
    (r"\.attn\.([qv])_proj\.bias$", r".attn.\1_bias"),
    (r"\.mlp\.fc1_g\.", ".mlp.w1."),
    (r"\.mlp\.fc1_x\.", ".mlp.w2."),
    (r"\.mlp\.fc2\.", ".mlp.w3."),
)
# The keys of config.json that torch models are made from; others may name code, or kernels to fetch.
_DECODER = (
    *(theirs for theirs, _ in formats.LLM_KEYS),
    *(
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        *formats.FIXED,
        "max_position_embeddings",
        "tie_word_embeddings",
    ),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "header_ids", "eot_token_id")
_SETTINGS = (*_DECODER, *_TOKENS, *formats.SECTIONS, "frame_sampling", "mm_projector_type")
Run = tuple[np.ndarray, list[int]]  # logits float32[T, V] of a prompt, ids of the greedy answer


def turn(media: Path, query: str) -> dict[str, Any]:
    """A question about a video or image, for `inference.chat`."""
    is_image = media.suffix.lower() in IMAGE_SUFFIXES
    return ask(query, None if is_image else media, media if is_image else None)


# ------------------------------------------------------------------------------------------ JAX


class InJax:
    """A model in JAX that computes in float32, even where matrix products are less exact by default (TPU, GPU).

    Parts that the source lacks are small zeros, and are never run.
    """

    def __init__(self, source: WeightSource) -> None:
        """Reads every weight. Raises UserError."""
        from kangaroo_jax.checkpoints import reading
        from kangaroo_jax.models.parameters import abstract_model

        self.source = source
        config = ConfigDict(source.config.to_dict())
        config.model.update(dtype="float32", attention="auto")
        _shrink(config.model, {path.split("/")[0] for path in source.weights.specs})
        self.config = StageConfig.from_config(config)
        binding = abstract_model(self.config.model)
        if source.layout == "orbax":
            params = reading.load_params(source.path, binding)
        else:
            params = {path: _array(source, path, shape) for path, shape in binding.shapes.items()}
        self.model: Model = binding.bind(params).unstack()

    def chat(self) -> Kangaroo:
        """The model with its tokenizer. Raises UserError if it has none."""
        from kangaroo_jax.data.tokenizer import load_tokenizer

        if self.source.tokenizer is None:
            raise UserError(f"{self.source.path}: no tokenizer beside the weights; put one there, or give --tokenizer")
        return Kangaroo(self.model, self.config, load_tokenizer(self.source.tokenizer))

    def answer(self, recipe: Any) -> Run:
        """The run of a prompt with media (see `Kangaroo.recipe`)."""
        ref = recipe.media[0]
        clip = load_media(ref.path, ref.kind, image_size=self.config.data.image_size, times=ref.times, start=ref.start)
        return self._run(recipe.tokens, recipe.is_vision, (ref,), (clip.pixels, clip.times.astype(np.float32)))

    def continue_text(self, ids: list[int], length: int = GREEDY) -> Run:
        """The run of a text prompt, with an answer of `length` tokens."""
        return self._run(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), (), None, length)

    def _run(
        self,
        tokens: np.ndarray,
        is_vision: np.ndarray,
        media: tuple[MediaRef, ...],
        clip: tuple[np.ndarray, np.ndarray] | None,
        length: int = GREEDY,
    ) -> Run:
        """`clip`: frames uint8[F, S, S, 3] of the medium and their seconds."""
        rows: dict[str, np.ndarray] = {}
        request = Request(tokens, is_vision, media, length)
        sizes = Sizes.for_context(len(tokens) + length, slots=1)
        with Engine(self.model, sizes, vision=lambda _: Given(rows), precision="highest") as engine:
            if clip is not None:
                rows[media[0].path] = _vision(engine.programs, *clip)
            answer = engine.submit(request).result()
        index = np.where(is_vision, np.cumsum(is_vision) - 1, -1).astype(np.int32)
        with jax.default_matmul_precision("highest"):
            run = jax.jit(_logits, static_argnums=0)
            vision = rows[media[0].path][None] if media else None
            logits = run(*nnx.split(self.model), tokens[None].astype(np.int32), index[None], vision)
        return np.asarray(logits)[0], list(answer.ids)

    def features(self, frames: np.ndarray) -> np.ndarray:
        """frames uint8[F, S, S, 3] -> the encoder's patch tokens float32[F, P, D]."""
        with jax.default_matmul_precision("highest"):
            return np.asarray(jax.jit(_features, static_argnums=0)(*nnx.split(self.model.vision), frames))


def _shrink(model: ConfigDict, parts: set[str]) -> None:
    """Make the parts of a config that are not in `parts` as small as possible."""
    if "vision" not in parts:
        model.vision.update(width=8, depth=1, heads=1, mlp_width=8, pos_embed_grid=1)
        model.projector = "linear"
    if "llm" not in parts:
        model.llm.update(vocab_size=8, width=8, depth=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8)


def _array(source: WeightSource, path: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    if path not in source.weights.specs:
        return jnp.zeros(shape.shape, jnp.float32)
    return jnp.asarray(source.weights.read(path, whole(shape.shape)))


def _logits(graph: Any, weights: Any, tokens: jax.Array, vision_index: jax.Array, vision: jax.Array | None) -> Any:
    model: Model = nnx.merge(graph, weights)
    x = model.embed(tokens, vision_index, vision)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.unembed(model.llm(x, jnp.ones_like(tokens), positions))


def _vision(programs: Programs, frames: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Vision tokens [R, D] of frames uint8[F, S, S, 3] and their seconds float32[F]."""
    size, rows = programs.frames_a_call, []
    for start in range(0, len(frames), size):
        part, seconds = frames[start : start + size], times[start : start + size]
        missing = size - len(part)
        padded = np.pad(part, ((0, missing), (0, 0), (0, 0), (0, 0)))
        found = np.asarray(programs.encode(padded, np.pad(seconds, (0, missing))))
        rows.append(found[: len(found) * len(part) // size])
    return np.concatenate(rows)


def _features(graph: Any, weights: Any, frames: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights)(frames)


# ---------------------------------------------------------------------------------------- torch


class InTorch:
    """A model with a decoder in PyTorch, in float32: a Kangaroo by our model file, a Llama by transformers."""

    def __init__(self, source: WeightSource, scratch: Path) -> None:
        """Reads every weight; `scratch` is an empty folder. Raises UserError."""
        self._torch = import_torch("the comparison is run in torch")
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise UserError(f"the comparison is run by transformers: {install_line('convert')}") from None
        self.model: Any
        self.tokenizer: Any
        folder = source.path if source.path.is_dir() else source.path.parent
        load = {"llama": _llama, "gguf": _gguf}.get(source.layout, _kangaroo)
        try:
            with _quiet():
                self.model, report, self.tokenizer = load(source, folder, scratch)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{folder}: PyTorch cannot load it ({why})") from None
        lost = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]]
        lost = [name for name in lost if not re.search(r"rotary_emb\.inv_freq|freqs_(cos|sin)$", str(name))]
        if lost:
            raise UserError(f"{folder}: PyTorch does not load {names.brief(map(str, lost))}")
        self.model.eval()

    def answer(self, media: Path, query: str) -> tuple[np.ndarray, list[int], list[int]]:
        """(logits float32[T, V], the greedy answer's ids, the prompt's ids) of a question about a file."""
        kind = "image" if media.suffix.lower() in IMAGE_SUFFIXES else "video"
        from kangaroo_jax.conversion.torch_model.processing_kangaroo import KangarooProcessor

        processor = KangarooProcessor(self.model.config, self.tokenizer)
        content = [{"type": kind, kind: str(media)}, {"type": "text", "text": query}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}])
        return (*self._run(inputs), inputs["input_ids"][0].tolist())

    def continue_text(self, ids: list[int]) -> Run:
        """The run of a text prompt."""
        tokens = self._torch.tensor([ids])
        return self._run({"input_ids": tokens, "attention_mask": self._torch.ones_like(tokens)})

    def _run(self, inputs: Mapping[str, Any]) -> Run:
        greedy: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, eos_token_id=-1)
        with self._torch.no_grad(), _quiet():
            logits = self.model(**inputs, use_cache=False).logits[0].numpy()
            ids = self.model.generate(**inputs, max_new_tokens=GREEDY, pad_token_id=0, **greedy)[0].tolist()
        return logits, ids[inputs["input_ids"].shape[1] :]

    def chat(self, media: Path, query: str, max_new_tokens: int) -> str:
        """The greedy answer, from the method that users call."""
        options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, do_sample=False)
        return self.model.chat(video_path=str(media), query=query, tokenizer=self.tokenizer, **options)[0]


Loaded = tuple[Any, Mapping[str, Any], Any]  # a model, the report of names that do not match, a tokenizer or None


def _llama(source: WeightSource, folder: Path, scratch: Path) -> Loaded:
    from transformers import LlamaForCausalLM

    model, report = _filled(LlamaForCausalLM, _llama_config(folder), _state(source))
    return model, report, _own_tokenizer(folder)


def _gguf(source: WeightSource, folder: Path, scratch: Path) -> Loaded:
    """By transformers' own reader of such files."""
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    options: dict[str, Any] = dict(gguf_file=source.path.name, dtype=torch.float32, output_loading_info=True)
    loaded: Any = LlamaForCausalLM.from_pretrained(str(folder), **options)
    model, report = loaded
    for name, data in tokenizer_files(source.path).items():
        (scratch / name).write_bytes(data)
    return model, report, PreTrainedTokenizerFast(tokenizer_file=str(scratch / "tokenizer.json"))


def _llama_config(folder: Path) -> Any:
    """The LlamaConfig of a folder. For transformers 4 the `rope_parameters` that 5 writes are translated."""
    from transformers import LlamaConfig

    raw = read_json(folder / "config.json")
    config: Any = LlamaConfig(**{key: value for key, value in raw.items() if key in _DECODER})
    rope = dict(raw.get("rope_parameters") or {})
    if rope and not hasattr(LlamaConfig(), "rope_parameters"):
        config.rope_theta = rope.pop("rope_theta", config.rope_theta)
        config.rope_scaling = rope if rope.get("rope_type", "default") != "default" else None
    return config


def _kangaroo(source: WeightSource, folder: Path, scratch: Path) -> Loaded:
    """A model with the release's names, run by our model file.

    The config.json of an export is complete. From another one the decoder's keys are taken, and the preset gives the
    rest.
    """
    from kangaroo_jax.conversion.torch_model.configuration_kangaroo import KangarooConfig
    from kangaroo_jax.conversion.torch_model.modeling_kangaroo import KangarooForCausalLM

    raw, given = formats.write_hf(source.config, "float32"), read_json(folder / "config.json")
    tokenizer: Any = None
    if formats.SECTIONS.keys() <= given.keys():
        raw.update(given)
        tokenizer = _own_tokenizer(folder)
    else:
        raw.update({key: given[key] for key in _DECODER if given.get(key) is not None})
    if tokenizer is None and source.tokenizer is not None:
        from kangaroo_jax.conversion.tokenizers import write_tokenizer

        raw.update(write_tokenizer(source.tokenizer, source.config, scratch))
        tokenizer = _own_tokenizer(scratch)
    config = KangarooConfig(**{key: value for key, value in raw.items() if key in _SETTINGS})
    return *_filled(KangarooForCausalLM, config, _state(source)), tokenizer


def _state(source: WeightSource) -> dict[str, Any]:
    """The weights of a source, by the names in the libraries' models."""
    given = read_json((source.path if source.path.is_dir() else source.path.parent) / "config.json")
    convolution = ""
    if source.layout == "kangaroo":
        (patchify,) = {row.theirs for row in _rows(source) if row.ours == "patchify/kernel"}
        convolution = patchify.removesuffix("weight")

    def rename(name: str) -> str:
        if convolution and name.startswith(convolution):
            return f"patchify.{name.removeprefix(convolution)}"
        return name

    state = torch_state(source.path, rename)
    if "lm_head.weight" not in state and given.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _filled(kind: Any, config: Any, state: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """(a model of an installed class with these weights, the report of names that do not match).

    `from_pretrained` is not used, because in some releases of transformers it runs files of the folder.
    """
    import torch

    with torch.device("meta"):  # the read tensors become the parameters, so the model is in memory once
        model = kind(config)
    result = model.load_state_dict(state, strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.model.config)
    return model, dict(missing_keys=result.missing_keys, unexpected_keys=result.unexpected_keys, mismatched_keys=[])


def _own_tokenizer(folder: Path) -> Any:
    """The tokenizer.json of a folder, None if it has none. Raises UserError for an unsupported one."""
    from transformers import PreTrainedTokenizerFast

    from kangaroo_jax.data.tokenizer import load_tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    settings = load_tokenizer(file).settings  # raises for unsupported parts
    options: dict[str, Any] = {} if settings is None else {"chat_template": settings.template, **settings.tokens}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **options)


def code_of(source: WeightSource) -> str:
    """The origin of the code that PyTorch runs for a source, in words."""
    if source.layout in ("llama", "gguf"):
        return "transformers' LlamaForCausalLM"
    mine = "this package's model file"
    folder = source.path if source.path.is_dir() else source.path.parent
    files = [(folder / name, CODE / name) for name in CODE_FILES]
    if source.layout != "kangaroo" or not any(given.is_file() for given, _ in files):
        return mine
    same = all(given.is_file() and given.read_bytes() == ours.read_bytes() for given, ours in files)
    return f"{mine} (the folder's own code is {'the same' if same else 'another, which was not run'})"


def _rows(source: WeightSource) -> list[names.NameRow]:
    return table_for(source.layout, source.config.model, open_model(source.path))


def torch_state(path: Path, rename: Callable[[str], str]) -> dict[str, Any]:
    """The tensors of a file or folder in float32, read by the safetensors and torch libraries."""
    torch = import_torch("the comparison is run in torch")
    files = sorted({tensor.file for tensor in open_tensors(path).values()})
    state: dict[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(file), "pt") as opened:
                state.update({name: opened.get_tensor(name).float() for name in opened.keys()})
        else:
            state.update({name: _as_torch(torch, t.read()) for name, t in open_tensors(file).items()})
    return {rename(short): state[name] for name, short in unwrapped(state).items()}


def _as_torch(torch: Any, array: np.ndarray) -> Any:
    return torch.from_numpy(np.array(array, np.float32))


def torch_features(source: WeightSource, frames: np.ndarray, scratch: Path) -> np.ndarray:
    """frames uint8[F, S, S, 3] -> patch tokens float32[F, P, D] from a bare encoder, or a Kangaroo's, in PyTorch.

    Raises UserError.
    """
    torch = import_torch("the comparison is run in torch")
    if source.layout == "kangaroo":
        tower = InTorch(source, scratch).model.vision_tower
    else:
        try:
            from kangaroo_jax.conversion.torch_model.modeling_kangaroo import VisionTower
        except ImportError:
            raise UserError(f"the comparison is run by transformers: {install_line('convert')}") from None
        tower = VisionTower(source.config.model.vision.to_dict())
        state = torch_state(source.path, _name_in_tower(source.layout))
        wanted = tower.state_dict()
        lacking = [name for name in wanted if name not in state or state[name].shape != wanted[name].shape]
        if lacking:
            raise UserError(f"{source.path}: PyTorch does not load {names.brief(lacking)}")
        tower.load_state_dict({name: state[name] for name in wanted})
    from kangaroo_jax.conversion.torch_model.processing_kangaroo import normalise

    with torch.no_grad():
        return tower.eval()(normalise(frames)).numpy()


def _name_in_tower(layout: str) -> Callable[[str], str]:
    def name_in_tower(name: str) -> str:
        name = name.removeprefix("visual.")
        for pattern, eva in FROM_TIMM if layout == "timm" else ():
            name = re.sub(pattern, eva, name)
        return name

    return name_in_tower


class _quiet:
    """A context in which transformers prints no progress bars or warnings."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        logging.enable_progress_bar()
