"""The two-way table of names: for every parameter its path in our layout ("here"), its name in another layout
("there"), and the rearrangement between the two.

A row holds one rearrangement (split dimensions, then reorder them). `here` applies it and `there` inverts it, so that
both directions come from the same row, move every number once, and change none.

    layout     what it is                                                      covers
    kangaroo   the released Kangaroo: Llama, `vision_tower.*`, `mm_projector.*`  everything
    llama      Llama on Hugging Face                                           llm/
    meta       Llama as Meta publishes it                                      llm/
    gguf       Llama in a file of llama.cpp, which is only read                llm/
    eva        EVA-CLIP and OpenCLIP, `visual.*` (or without that prefix)      vision/
    timm       the same encoder with timm's names                              vision/
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from kangaroo_jax.errors import UserError

LAYOUTS = {
    "kangaroo": ("",),
    **dict.fromkeys(("llama", "meta", "gguf"), ("llm/",)),
    **dict.fromkeys(("eva", "timm"), ("vision/",)),
}
STACKED = re.compile(r"(llm/layers|vision/blocks)/")  # paths with a leading axis of layers
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A shape there, its dimensions split to `split`, and the order of these here."""

    shape: Shape
    split: Shape
    order: tuple[int, ...]


# Layouts there of a parameter with a given shape here. Linear maps are [out, in] in torch and [in, out] here.
LAID_OUT: dict[str, Callable[[Shape], Arrangement]] = {
    "same": lambda s: Arrangement(s, s, tuple(range(len(s)))),
    "linear": lambda s: Arrangement((s[1], s[0]), (s[1], s[0]), (1, 0)),
    "to_heads": lambda s: Arrangement((s[1] * s[2], s[0]), (s[1], s[2], s[0]), (2, 0, 1)),  # [N H, D], [D, N, H]
    "from_heads": lambda s: Arrangement((s[2], s[0] * s[1]), (s[2], s[0], s[1]), (1, 2, 0)),  # [D, N H], [N, H, D]
    "heads_bias": lambda s: Arrangement((s[0] * s[1],), s, (0, 1)),  # [N H], [N, H]
    # Meta and llama.cpp rotate the pairs (2i, 2i + 1); we rotate (i, i + H / 2), like Hugging Face.
    "to_rotary_heads": lambda s: Arrangement(
        (s[1] * s[2], s[0]), (s[1], s[2] // 2, 2, s[0]), (3, 0, 2, 1)
    ),  # [N (H/2 2), D], [D, N, (2 H/2)]
    "patches": lambda s: _patches(s, math.isqrt(s[0] // 3)),  # [D, 3, p, p], [(p p 3), D]
    "depthwise": lambda s: Arrangement((s[3], 1, *s[:3]), (s[3], *s[:3]), (1, 2, 3, 0)),  # [D, 1, k, r, c]
    "token": lambda s: Arrangement((1, 1, *s), s, (0,)),  # [1, 1, D], [D]
    "positions": lambda s: Arrangement((1, *s), s, (0, 1)),  # [1, 1 + P, D], [1 + P, D]
}


def _patches(s: Shape, p: int) -> Arrangement:
    return Arrangement((s[1], 3, p, p), (s[1], 3, p, p), (2, 3, 1, 0))


@dataclasses.dataclass(frozen=True)
class NameRow:
    """One parameter (of one layer) here and there."""

    ours: str  # path, as in `training.parameters`
    layer: int | None  # its index on the leading axis of a stacked parameter
    theirs: str
    shape_here: Shape  # shape of the one layer
    arrangement: Arrangement
    rows: tuple[int, ...] = ()  # if not empty, only these rows of their tensor

    @property
    def shape_there(self) -> Shape:
        """Shape of the whole tensor there. Raises ValueError for a row that is only some rows of a tensor."""
        if self.rows:
            raise ValueError(f"{self.theirs}: its shape is not that of {self.ours}")
        return self.arrangement.shape

    @property
    def cut_axis(self) -> int | None:
        """The axis here that is the first axis there, if both can be cut into ranges along it; else None."""
        a = self.arrangement
        whole = a.split == a.shape and len(self.shape_here) == len(a.split) and not self.rows
        return a.order.index(0) if whole else None

    def here(self, array: np.ndarray) -> np.ndarray:
        """A tensor of theirs (or a range of it along its first axis) in the layout here."""
        a = self.arrangement
        if array.shape == a.shape:
            return array.reshape(a.split).transpose(a.order).reshape(self.shape_here)
        return array.transpose(a.order)

    def there(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `here`."""
        a = self.arrangement
        back = tuple(np.argsort(a.order))
        if array.shape == self.shape_here:
            return array.reshape([a.split[i] for i in a.order]).transpose(back).reshape(a.shape)
        return array.transpose(back)


# ----------------------------------------------------------------------------------- the table

# path here, layout, name on Hugging Face, name at Meta, name in llama.cpp
LLM = (
    ("llm/embedding", "same", "model.embed_tokens.weight", "tok_embeddings.weight", "token_embd.weight"),
    ("llm/norm/scale", "same", "model.norm.weight", "norm.weight", "output_norm.weight"),
    ("llm/head/kernel", "linear", "lm_head.weight", "output.weight", "output.weight"),
    *(
        (
            f"llm/layers/{ours}",
            how,
            f"model.layers.{{i}}.{hf}.weight",
            f"layers.{{i}}.{meta}.weight",
            f"blk.{{i}}.{gguf}.weight",
        )
        for ours, how, hf, meta, gguf in (
            ("attention_norm/scale", "same", "input_layernorm", "attention_norm", "attn_norm"),
            ("attention/query/kernel", "to_heads", "self_attn.q_proj", "attention.wq", "attn_q"),
            ("attention/key/kernel", "to_heads", "self_attn.k_proj", "attention.wk", "attn_k"),
            ("attention/value/kernel", "to_heads", "self_attn.v_proj", "attention.wv", "attn_v"),
            ("attention/out/kernel", "from_heads", "self_attn.o_proj", "attention.wo", "attn_output"),
            ("mlp_norm/scale", "same", "post_attention_layernorm", "ffn_norm", "ffn_norm"),
            ("mlp/gate/kernel", "linear", "mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
            ("mlp/up/kernel", "linear", "mlp.up_proj", "feed_forward.w3", "ffn_up"),
            ("mlp/down/kernel", "linear", "mlp.down_proj", "feed_forward.w2", "ffn_down"),
        )
    ),
)
ROTARY_IN_PAIRS = ("llm/layers/attention/query/kernel", "llm/layers/attention/key/kernel")

# path here, layout, EVA's name, timm's name
VISION = (
    ("vision/cls_token", "token", "cls_token", "cls_token"),
    ("vision/position_embedding", "positions", "pos_embed", "pos_embed"),
    ("vision/patch_embedding/kernel", "patches", "patch_embed.proj.weight", "patch_embed.proj.weight"),
    ("vision/patch_embedding/bias", "same", "patch_embed.proj.bias", "patch_embed.proj.bias"),
    ("vision/norm/scale", "same", "norm.weight", "norm.weight"),
    ("vision/norm/bias", "same", "norm.bias", "norm.bias"),
    *(
        (f"vision/blocks/{ours}", how, f"blocks.{{i}}.{eva}", f"blocks.{{i}}.{timm}")
        for ours, how, eva, timm in (
            ("attention_norm/scale", "same", "norm1.weight", "norm1.weight"),
            ("attention_norm/bias", "same", "norm1.bias", "norm1.bias"),
            ("attention/query/kernel", "to_heads", "attn.q_proj.weight", "attn.q_proj.weight"),
            ("attention/query/bias", "heads_bias", "attn.q_bias", "attn.q_proj.bias"),
            ("attention/key/kernel", "to_heads", "attn.k_proj.weight", "attn.k_proj.weight"),
            ("attention/value/kernel", "to_heads", "attn.v_proj.weight", "attn.v_proj.weight"),
            ("attention/value/bias", "heads_bias", "attn.v_bias", "attn.v_proj.bias"),
            ("attention/norm/scale", "same", "attn.inner_attn_ln.weight", "attn.norm.weight"),
            ("attention/norm/bias", "same", "attn.inner_attn_ln.bias", "attn.norm.bias"),
            ("attention/out/kernel", "linear", "attn.proj.weight", "attn.proj.weight"),
            ("attention/out/bias", "same", "attn.proj.bias", "attn.proj.bias"),
            ("mlp_norm/scale", "same", "norm2.weight", "norm2.weight"),
            ("mlp_norm/bias", "same", "norm2.bias", "norm2.bias"),
            ("mlp/gate/kernel", "linear", "mlp.w1.weight", "mlp.fc1_g.weight"),
            ("mlp/gate/bias", "same", "mlp.w1.bias", "mlp.fc1_g.bias"),
            ("mlp/up/kernel", "linear", "mlp.w2.weight", "mlp.fc1_x.weight"),
            ("mlp/up/bias", "same", "mlp.w2.bias", "mlp.fc1_x.bias"),
            ("mlp/norm/scale", "same", "mlp.ffn_ln.weight", "mlp.norm.weight"),
            ("mlp/norm/bias", "same", "mlp.ffn_ln.bias", "mlp.norm.bias"),
            ("mlp/down/kernel", "linear", "mlp.w3.weight", "mlp.fc2.weight"),
            ("mlp/down/bias", "same", "mlp.w3.bias", "mlp.fc2.bias"),
        )
    ),
)

# path here, layout, name in the release; {patchify} is the name that its config gives to the convolution
JOINT = (
    ("patchify/kernel", "depthwise", "{patchify}.weight"),
    ("patchify/bias", "same", "{patchify}.bias"),
)
PROJECTORS = {
    "mlp2x_gelu": (
        ("projector/first/kernel", "linear", "mm_projector.0.weight"),
        ("projector/first/bias", "same", "mm_projector.0.bias"),
        ("projector/second/kernel", "linear", "mm_projector.2.weight"),
        ("projector/second/bias", "same", "mm_projector.2.bias"),
    ),
    "linear": (
        ("projector/first/kernel", "linear", "mm_projector.weight"),
        ("projector/first/bias", "same", "mm_projector.bias"),
    ),
}
SPECIAL = "special_embedding"  # there it is in the rows `special_ids` of the token embedding

# Tensors that files of a layout may hold but that are no weights of this model: pattern -> description.
CLIP_HEAD = "CLIP's projection, text tower and temperature"
NOT_WEIGHTS = {
    "eva": ((r"text\..*|logit_scale|logit_bias|(visual\.)?head\.(weight|bias)", CLIP_HEAD),),
    "timm": ((r"head\.(weight|bias)", CLIP_HEAD),),
    "gguf": ((r"rope_freqs\.weight", "the rope scaling's divisors, which the config has"),),
}
# Tables in a file that follow from its config: they are compared with computed ones.
DERIVED = {
    "kangaroo": ((r"vision_tower\.(.*\.)?freqs_(cos|sin)", "vision"), (r"model\..*rotary_emb\.inv_freq", "llm")),
    "eva": ((r"(visual\.)?(.*\.)?freqs_(cos|sin)", "vision"),),
    "llama": ((r"model\..*rotary_emb\.inv_freq", "llm"),),
    "meta": ((r"rope\.freqs", "llm"),),
}


def entries(
    layout: str, *, projector: str = "mlp2x_gelu", patchify: str = "patchify", prefix: str = "visual."
) -> list[tuple[str, str, str]]:
    """(path here, layout, name there) of every parameter; "{i}" in a name is the layer.

    `prefix` is for the layout `eva`. Raises KeyError for an unknown layout or projector.
    """
    if layout == "llama":
        return [(ours, how, hf) for ours, how, hf, *_ in LLM]
    if layout in ("meta", "gguf"):
        rotary = {ours: "to_rotary_heads" for ours in ROTARY_IN_PAIRS}
        column = 3 if layout == "meta" else 4
        return [(row[0], rotary.get(row[0], row[1]), row[column]) for row in LLM]
    if layout == "eva":
        return [(ours, how, prefix + eva) for ours, how, eva, _ in VISION]
    if layout == "timm":
        return [(ours, how, timm) for ours, how, _, timm in VISION]
    joint = [(ours, how, name.replace("{patchify}", patchify)) for ours, how, name in JOINT]
    vision = [(ours, how, f"vision_tower.{eva}") for ours, how, eva, _ in VISION]
    return [*entries("llama"), *vision, *joint, *PROJECTORS[projector]] if LAYOUTS[layout] else []


def table(layout: str, shapes: Mapping[str, Shape], special_ids: Sequence[int] = (), **options: str) -> list[NameRow]:
    """Every row of a layout for a model whose parameters have `shapes` here.

    Args:
        layout: a key of LAYOUTS.
        shapes: path -> shape, for the whole model.
        special_ids: rows of the token embedding that hold the marks around a video (layout `kangaroo`).
        options: see `entries`.

    Raises:
        UserError: a parameter that the layout covers has no row, so that it would be lost.
    """
    covered = {path for path in shapes if path.startswith(LAYOUTS[layout])}
    rows = []
    for ours, how, theirs in entries(layout, **options):
        if ours not in covered:
            continue
        covered.discard(ours)
        stacked = STACKED.match(ours)
        shape = tuple(shapes[ours][1:] if stacked else shapes[ours])
        for layer in range(shapes[ours][0]) if stacked else (None,):
            name = theirs.replace("{i}", str(layer))
            rows.append(NameRow(ours, layer, name, shape, LAID_OUT[how](shape)))
    if SPECIAL in covered:
        covered.discard(SPECIAL)
        shape = tuple(shapes[SPECIAL])
        embedding = next(theirs for ours, _, theirs in entries(layout, **options) if ours == "llm/embedding")
        rows.append(NameRow(SPECIAL, None, embedding, shape, LAID_OUT["same"](shape), tuple(special_ids)))
    if covered:
        raise UserError(f"layout {layout}: no name for {', '.join(sorted(covered))}")
    return rows


def match(rows: Iterable[NameRow], found: Mapping[str, Shape], where: str, known: Iterable[str] = ()) -> None:
    """Check that a file has exactly the tensors of the table, each once.

    Args:
        rows: the table.
        found: name there -> shape.
        where: the file or folder, for the message.
        known: patterns of names that are allowed without a row.

    Raises:
        UserError: naming every tensor that is missing, unknown or of another shape.
    """
    wanted = {row.theirs: row.shape_there for row in rows if not row.rows}
    missing = [name for name in wanted if name not in found]
    patterns = [re.compile(pattern) for pattern in known]
    unknown = [n for n in found if n not in wanted and not any(p.fullmatch(n) for p in patterns)]
    wrong: dict[tuple[Shape, Shape], list[str]] = {}
    for name, shape in wanted.items():
        if name in found and tuple(found[name]) != shape:
            wrong.setdefault((tuple(found[name]), shape), []).append(name)
    problems = [f"missing: {brief(missing)}"] if missing else []
    problems += [f"unknown: {brief(unknown)}"] if unknown else []
    problems += [f"of shape {found} where the config wants {shape}: {brief(n)}" for (found, shape), n in wrong.items()]
    if problems:
        count = len(missing) + len(unknown) + sum(map(len, wrong.values()))
        raise UserError(f"{where}: {count} tensors do not fit the model; {'; '.join(problems)}")


def brief(names: Iterable[str]) -> str:
    """All names, those that differ only in the layer's number as one: "model.layers.{0-31}.mlp.up_proj.weight"."""
    groups: dict[tuple[str, str], list[int | None]] = {}
    for name in names:
        parts = re.fullmatch(r"(.*?(?:layers|blocks|blk)\.)(\d+)(\..*)", name)
        key, number = ((parts[1], parts[3]), int(parts[2])) if parts else ((name, ""), None)
        groups.setdefault(key, []).append(number)
    return ", ".join(
        head if numbers[0] is None else f"{head}{_ranges(sorted(n for n in numbers if n is not None))}{tail}"
        for (head, tail), numbers in groups.items()
    )


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return "{" + ",".join("-".join(map(str, run)) for run in runs) + "}"
