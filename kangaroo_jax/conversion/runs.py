"""A run that trained an adapter, as the model that it made: its base with the factors added."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from kangaroo_jax.checkpoints import reading
from kangaroo_jax.checkpoints.adapters import Base, check_base, find_base, kept_base
from kangaroo_jax.checkpoints.adapters import open_adapter as open_kept
from kangaroo_jax.checkpoints.stored import Stored, stored_form
from kangaroo_jax.config import LoraConfig, ModelConfig
from kangaroo_jax.conversion.lora import Merged, open_adapter
from kangaroo_jax.conversion.quantize import Dequantized, Quantized
from kangaroo_jax.conversion.sources import WeightSource, open_ours
from kangaroo_jax.conversion.weights import Weights
from kangaroo_jax.errors import UserError


def run_base(source: str | Path) -> Base | None:
    """The base that the run in `source` adapts; None if it is no run that trained an adapter. Raises UserError."""
    path = Path(source)
    if not path.is_dir():
        return None
    try:
        folder = reading.find(path)
    except UserError:
        return None
    return kept_base(folder) if reading.is_adapter(folder) else None


def open_run(source: str | Path, base: str | Path | None, ema: bool = False) -> WeightSource:
    """The merged model of a run, with the run's config and tokenizer.

    Where the decoder was quantised in training, the factors are added to the numbers that it was rounded to. `base` is
    where the base is now, by default where it was; `ema` takes the average of the factors. Raises UserError if the base
    is gone or another, or no average was kept.
    """
    kept = open_kept(source, ema)
    assert kept.base is not None
    folder = reading.refuse_adapter(reading.find(base)) if base else find_base(kept.folder, kept.base)
    check_base(folder, kept)
    opened = open_ours(folder, quantized=True)
    stage = reading.load_config(kept.folder)
    weights: Weights = opened.weights
    form = stored_form(weights) if isinstance(weights, Stored) else None
    rounded = form or stage.lora.quantize
    if rounded:
        model = ModelConfig.from_config(opened.config.model)
        weights = Dequantized(weights if form else Quantized(weights, model, rounded), model, rounded)
    adapter = open_adapter(kept.folder, opened.config.model, ema)
    config = ConfigDict(stage.to_dict())
    config.model = opened.config.model
    config.lora = ConfigDict(dataclasses.asdict(LoraConfig()))
    return dataclasses.replace(
        opened,
        path=Path(source),
        weights=Merged(weights, adapter),
        config=config,
        tokenizer=reading.find_tokenizer(kept.folder),
        files=(*opened.files, *adapter.files),
    )
