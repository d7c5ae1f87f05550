"""LoRA adapters (Hu et al. 2021): in PEFT's layout, in ours, and added to the weights.

    ours   kernel [*in, *out] + scale * lora_a [*in, r] lora_b [r, *out], the two beside the kernel
    PEFT   weight [out, in] + scale * lora_B [out, r] lora_A [r, in]; scale = alpha / r, or alpha / sqrt(r)

An adapter of ours is a folder like a checkpoint's: `params`, a flat dictionary with the leading axis of layers,
and `config` with `lora` (PEFT's adapter_config.json), `model`, and `adapted`, the layers of each kernel that
have an adapter (None for a kernel without an axis of layers). In the other layers both factors are zero.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.frozen import weight_folders
from kangaroo_jax.checkpoints.stored import Box, Spec, Stored, check_finite
from kangaroo_jax.conversion import names
from kangaroo_jax.conversion.files import Tensor, files_of, open_tensors
from kangaroo_jax.conversion.names import STACKED, Arrangement, NameRow
from kangaroo_jax.conversion.sources import shapes_of, table_for
from kangaroo_jax.conversion.weights import Mapped, Weights
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.json_text import read_json

SETTINGS, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
# Keys of adapter_config.json that do not change the merged weights, or that are read here.
UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "bias", "megatron_core", "qalora_group_size"),
    "eva_config",  # how PEFT initialised the factors, which the file holds
}
# Initialisations that leave the base unchanged; others (PiSSA, OLoRA, LoftQ) also change the base.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
Layers = Mapping[str, tuple[int | None, ...]]  # path of a kernel -> its layers with an adapter


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of either layout.

    Attributes:
        path: the given path.
        layout: `peft` or `orbax`.
        weights: `lora_a` and `lora_b` under our names.
        adapted: the adapted kernels and their layers.
        settings: the contents of adapter_config.json.
        model: config.model of the model that it adapts.
        files: the files that the weights are read from.
    """

    path: Path
    layout: str
    weights: Weights
    adapted: Layers
    settings: Mapping[str, Any]
    model: ConfigDict
    files: tuple[Path, ...]

    @property
    def scale(self) -> float:
        """The number that the factors' product is multiplied by."""
        rank = self.settings["r"]
        return self.settings["lora_alpha"] / (rank**0.5 if self.settings.get("use_rslora") else rank)

    @property
    def rows(self) -> list[NameRow]:
        """The table's rows for its factors."""
        return factor_rows(kernels(self.model), self.adapted, self.settings["r"])


def layout_of(path: str | Path) -> str:
    """`peft` or `orbax` if the path is an adapter, or a run that trained one, else ""."""
    path = Path(path)
    if (path / SETTINGS).is_file():
        return "peft"
    try:
        return "orbax" if path.is_dir() and reading.is_adapter(reading.find(path)) else ""
    except UserError:
        return ""


def open_adapter(path: str | Path, model: ConfigDict | None, ema: bool = False) -> Adapter:
    """Open an adapter and check it against the table, without reading weights.

    Args:
        path: a PEFT folder, or one of ours.
        model: config.model of the model to adapt; None takes it from an adapter of ours.
        ema: take the average of the factors that a run of ours kept.

    Raises:
        UserError: it is no adapter, has no average, needs an unsupported feature, or does not fit the model; every
            tensor that is missing, unknown or of another shape is named.
    """
    folder = Path(path)
    kind = layout_of(folder)
    if kind == "orbax":
        return _open_ours(folder, model, ema)
    if kind != "peft":
        raise UserError(f"{folder / SETTINGS}: cannot be read; give the folder of a LoRA adapter (PEFT's, or ours)")
    if ema:
        raise UserError(f"{folder}: PEFT keeps no average of its factors; drop --ema")
    if model is None:
        raise ValueError("a PEFT folder does not say what it adapts")
    return _open_peft(folder, model)


# ------------------------------------------------------------------------------------- the table


def kernels(model: ConfigDict) -> dict[str, list[NameRow]]:
    """path -> the rows of every linear map that may have an adapter."""
    found: dict[str, list[NameRow]] = {}
    for row in table_for("kangaroo", model):
        if row.ours.endswith("/kernel") and len(row.arrangement.shape) == 2:
            found.setdefault(row.ours, []).append(row)
    return found


def module(row: NameRow) -> str:
    """The name of a linear map in PyTorch."""
    return row.theirs.removesuffix(".weight")


def beside(path: str, factor: str) -> str:
    """The path of a kernel's factor, with `lora_a` or `lora_b` instead of `kernel`."""
    return f"{path.removesuffix('kernel')}{factor}"


def factor_rows(kernels: Mapping[str, Sequence[NameRow]], adapted: Layers, rank: int) -> list[NameRow]:
    """Two rows, A and B, for every adapted linear map, derived from the row of its weight."""
    rows: list[NameRow] = []
    for path, layers in adapted.items():
        for row in kernels[path]:
            if row.layer in layers:
                rows += _factors(row, rank)
    return rows


def _factors(row: NameRow, rank: int) -> tuple[NameRow, NameRow]:
    (there_out, there_in), split = row.arrangement.shape, row.arrangement.split
    cut = next(n for n in range(1, len(split)) if np.prod(split[:n]) == there_out)
    out, ins = split[:cut], split[cut:]
    a = Arrangement((rank, there_in), (rank, *ins), (*range(1, 1 + len(ins)), 0))
    b = Arrangement((there_out, rank), (*out, rank), (len(out), *range(len(out))))
    name = f"base_model.model.{module(row)}"
    return (
        NameRow(beside(row.ours, "lora_a"), row.layer, f"{name}.lora_A.weight", (*ins, rank), a),
        NameRow(beside(row.ours, "lora_b"), row.layer, f"{name}.lora_B.weight", (rank, *out), b),
    )


def factor_shapes(model: ConfigDict, adapted: Layers, rank: int) -> dict[str, names.Shape]:
    """path -> shape of every factor in our layout, with all layers of a stack."""
    shapes, every = shapes_of(model), kernels(model)
    found = {}
    for path in adapted:
        for row in _factors(every[path][0], rank):
            found[row.ours] = (*(shapes[path][:1] if row.layer is not None else ()), *row.shape_here)
    return found


# ----------------------------------------------------------------------------------------- PEFT


def check_settings(settings: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """adapter_config.json with its numbers checked. Raises UserError that names unsupported settings."""
    odd = [f"{key}={settings[key]!r}" for key in sorted(set(settings) - UNDERSTOOD) if settings[key]]
    if settings.get("bias", "none") != "none":
        odd.append(f"bias={settings['bias']!r}")
    if settings.get("init_lora_weights") not in PLAIN_INITS:
        odd.append(f"init_lora_weights={settings['init_lora_weights']!r}, which changes the base's weights too")
    if str(settings.get("peft_type", "LORA")).upper() != "LORA":
        odd.insert(0, f"peft_type={settings['peft_type']!r}")
    if odd:
        raise UserError(f"{where}: not done here: {', '.join(odd)}; merge the adapter with PEFT and convert the model")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha:
        raise UserError(f"{where}: needs r, a whole number above 0, and lora_alpha, a number (r={rank}, {alpha=})")
    return dict(settings)


def selected(settings: Mapping[str, Any], candidates: Iterable[str], where: Path) -> list[str]:
    """The linear maps that PEFT adapts with these settings. Raises UserError for invalid settings."""
    wanted, excluded = settings.get("target_modules"), settings.get("exclude_modules") or []
    if not wanted or not all(isinstance(value, str | list) for value in (wanted, excluded)):
        raise UserError(f"{where}: needs target_modules, a list of names or a regular expression; save it with PEFT")
    only, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern") or r"[^.]*"
    layers = {only} if isinstance(only, int) else set(only or ())
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def takes(name: str) -> bool:
        if _is_meant(name, excluded):
            return False
        if wanted == "all-linear":
            return name != "lm_head"
        if not _is_meant(name, wanted):
            return False
        if not layers or name in wanted:
            return True
        number = next((m for p in patterns if (m := re.match(rf".*\.{p}\.(\d+)\.", name))), None)
        return number is not None and int(number[1]) in layers

    try:
        return [name for name in candidates if takes(name)]
    except re.error as error:
        raise UserError(f"{where}: target_modules or layers_pattern is no regular expression ({error})") from None


def _is_meant(name: str, meant: str | Sequence[str]) -> bool:
    if isinstance(meant, str):
        return re.fullmatch(meant, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in meant)


def _open_peft(folder: Path, model: ConfigDict) -> Adapter:
    settings = check_settings(read_json(folder / SETTINGS), folder / SETTINGS)
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: has no {' or '.join(FILES)}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in open_tensors(file).items():
        parts = NAME.fullmatch(name)
        usual = f"base_model.model.{parts[1]}.lora_{parts[2]}.weight" if parts else name
        if usual in tensors:
            raise UserError(f"{file}: has {usual} twice, under two names")
        tensors[usual] = tensor
    every = kernels(model)
    rows = {module(row): row for rows in every.values() for row in rows}
    # An adapter of a bare Llama adapts only the decoder, though the encoder's maps have the same last names.
    llm = not any(name.startswith(("base_model.model.vision_tower.", "base_model.model.mm_")) for name in tensors)
    candidates = [name for name, row in rows.items() if row.ours.startswith("llm/") or not llm]
    adapted: dict[str, tuple[int | None, ...]] = {}
    for name in selected(settings, candidates, folder / SETTINGS):
        row = rows[name]
        adapted[row.ours] = (*adapted.get(row.ours, ()), row.layer)
    table = factor_rows(every, adapted, settings["r"])
    names.match(table, {name: tensor.shape for name, tensor in tensors.items()}, str(file))
    if not table:
        raise UserError(f"{folder / SETTINGS}: target_modules means nothing of this model")
    mapped = Mapped(tensors, table)
    shapes = factor_shapes(model, adapted, settings["r"])
    specs = {path: Spec(shape, mapped.specs[path].dtype) for path, shape in shapes.items()}
    weights = _Sparse(mapped, specs, {(row.ours, row.layer) for row in table})
    return Adapter(folder, "peft", weights, adapted, settings, model, tuple(files_of(tensors)))


class _Sparse:
    """Stacked parameters in which missing layers are zero."""

    def __init__(self, weights: Weights, specs: Mapping[str, Spec], present: set[tuple[str, int | None]]) -> None:
        self._weights, self.specs, self._present = weights, specs, present

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        if not STACKED.match(path):
            return self._weights.read(path, box)
        rest = tuple(s.stop - s.start for s in box[1:])
        return np.concatenate(
            [
                self._weights.read(path, (slice(layer, layer + 1), *box[1:]))
                if (path, layer) in self._present
                else np.zeros((1, *rest), self.specs[path].dtype)
                for layer in range(box[0].start, box[0].stop)
            ]
        )


# ----------------------------------------------------------------------------------------- ours


def _open_ours(folder: Path, model: ConfigDict | None, ema: bool) -> Adapter:
    folder = reading.find(folder)
    (factors,) = weight_folders(folder, ema)
    config = _lists(reading.kept_config(folder))
    if "rank" in config.get("lora", {}):
        config |= _as_converted(config["lora"], Stored(factors).specs)
    if not {"lora", "model", "adapted"} <= set(config):
        raise UserError(f"{folder / 'config'}: is not the config of an adapter (lora, model, adapted)")
    model = ConfigDict(reading.load_config(folder).model.to_dict()) if model is None else model
    settings = check_settings(config["lora"], folder / "config")
    adapted = {path: (None,) if layers is None else tuple(layers) for path, layers in config["adapted"].items()}
    known = {(row.ours, row.layer) for rows in kernels(model).values() for row in rows}
    strange = [f"{p} ({n})" for p, layers in adapted.items() for n in layers if (p, n) not in known]
    if strange:
        raise UserError(f"{folder}: adapts {', '.join(strange)} (layer), which the model does not have")
    weights = Stored(factors)
    _check_shapes(weights.specs, factor_shapes(model, adapted, settings["r"]), folder)
    files = tuple(sorted(f for f in factors.rglob("*") if f.is_file()))
    return Adapter(folder, "orbax", weights, adapted, settings, model, files)


def _as_converted(lora: Mapping[str, Any], specs: Mapping[str, Spec]) -> dict[str, Any]:
    """What a converted adapter's config would say of one that training wrote: all layers of its maps are adapted."""
    settings = {"r": lora["rank"], "lora_alpha": lora["alpha"], "use_rslora": lora["rslora"]}
    paths = [path.removesuffix("lora_a") + "kernel" for path in specs if path.endswith("/lora_a")]
    layers = {
        path: list(range(specs[beside(path, "lora_a")].shape[0])) if STACKED.match(path) else None for path in paths
    }
    return {"lora": settings, "adapted": layers}


def _check_shapes(found: Mapping[str, Spec], wanted: Mapping[str, names.Shape], folder: Path) -> None:
    problems = [f"missing: {path}" for path in wanted if path not in found]
    problems += [f"unknown: {path}" for path in found if path not in wanted]
    problems += [
        f"of shape {found[path].shape} where the config wants {shape}: {path}"
        for path, shape in wanted.items()
        if path in found and found[path].shape != shape
    ]
    if problems:
        raise UserError(f"{folder}: {len(problems)} tensors do not fit the adapter; {'; '.join(problems)}")


def _lists(value: Any) -> Any:
    """The value with tuples as lists, as in JSON."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


# --------------------------------------------------------------------------------------- merged


class Merged:
    """Weights with an adapter added in float32; each sum is rounded once to the weight's type.

    Attributes:
        adapted: the kernels and layers that change.
    """

    def __init__(self, weights: Weights, adapter: Adapter) -> None:
        """Raises UserError if the adapter is for a part that the weights lack."""
        lacking = [path for path in adapter.adapted if path not in weights.specs]
        if lacking:
            raise UserError(f"{adapter.path}: adapts {', '.join(lacking)}, which these weights do not have")
        self._weights, self._adapter = weights, adapter
        self.adapted = adapter.adapted
        self.specs: Mapping[str, Spec] = weights.specs

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Weights`."""
        array = self._weights.read(path, box)
        if path not in self.adapted:
            return array
        if not STACKED.match(path):
            return self._added(array, path, (), box)
        layers = range(box[0].start, box[0].stop)
        return np.stack(
            [
                self._added(array[i], path, (slice(layer, layer + 1),), box[1:])
                if layer in self.adapted[path]
                else array[i]
                for i, layer in enumerate(layers)
            ]
        )

    def _added(self, array: np.ndarray, path: str, layer: Box, box: Box) -> np.ndarray:
        """One layer's box of the kernel with the product of the factors' boxes added."""
        factors, rank = self._adapter.weights, slice(0, self._adapter.settings["r"])
        a, b = beside(path, "lora_a"), beside(path, "lora_b")
        ins = len(factors.specs[a].shape) - len(layer) - 1
        left = factors.read(a, (*layer, *box[:ins], rank)).astype(np.float32)
        right = factors.read(b, (*layer, rank, *box[ins:])).astype(np.float32)
        total = np.tensordot(left[0] if layer else left, right[0] if layer else right, axes=1)
        total *= np.float32(self._adapter.scale)
        total += array
        with np.errstate(over="ignore"):
            total = total.astype(array.dtype)
        check_finite(total, f"{path} with the adapter added", self._adapter.path)
        return total
