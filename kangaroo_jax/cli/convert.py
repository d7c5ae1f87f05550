"""`kangaroo convert`: converts weights, and compares the result with the source."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from kangaroo_jax.cli.arguments import Natural, Overrides, listed
from kangaroo_jax.errors import UserError


def convert(
    *,
    source: Annotated[str, Parameter(name="--from")] = "",
    to: str,
    format: str = "",
    verify: bool = False,
    lora: str | None = None,
    ema: bool = False,
    vision: str | None = None,
    llm: str | None = None,
    base: str | None = None,
    dtype: str = "keep",
    preset: str = "kangaroo_8b",
    quantize: str | None = None,
    tokenizer: str | None = None,
    video: str | None = None,
    query: str | None = None,
    seed: Natural = 0,
    overrides: Overrides = (),
) -> None:
    """Convert weights from and to Hugging Face, PyTorch and Meta.

        kangaroo convert --from=KANGAROO_FOLDER --to=runs/start

    Folders may be repositories of Hugging Face's hub, OWNER/NAME or OWNER/NAME@REVISION. Keys of the model's config are
    flags, --config.KEY=VALUE, for what the files do not state.

    Args:
        source: folder or file to convert, or two that form a model, comma-separated
        to: new folder for the result
        format: orbax, hf, llama, meta, eva, timm or, for an adapter, peft; by default hf from ours, else orbax
        verify: compare each source with the result, one run in JAX, one in PyTorch; converts first if necessary
        lora: LoRA adapter (a PEFT folder, or one of ours), added to the weights
        ema: take the average of the weights, or of the adapter's factors, where training kept one
        vision: EVA02-CLIP encoder (EVA's, OpenCLIP's or timm's file), with --llm; by default a new one of --preset
        llm: decoder of Llama's architecture (a Hugging Face folder, a GGUF file, or Meta's folder)
        base: the model that a PEFT adapter in --from adapts, by default that of --preset; or where a run's base is now
        dtype: keep, float32, bfloat16 or float16
        quantize: int8 or int4: round the decoder's weights, for talking to the model (orbax alone)
        preset: the model, if the files do not state it
        tokenizer: the model's tokenizer; by default the one beside the weights
        video: video or image for --verify; by default a generated one
        query: question for --verify
        seed: seed of the parts that --vision and --llm leave to be initialised
    """
    from kangaroo_jax.cli.overrides import override, preset_of
    from kangaroo_jax.config import stage_config
    from kangaroo_jax.hub import local
    from kangaroo_jax.system.installing import install_line

    if verify and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise UserError(
            f"convert: --verify runs the model in PyTorch too, which is not installed: {install_line('convert')}"
        )
    if verify and quantize:
        raise UserError("convert: --verify compares models that are the same, which --quantize does not leave them")
    if verify and ema:
        raise UserError("convert: --verify reads no average: convert with --ema first, then --from=THAT --verify")
    if bool(source) == bool(vision or llm):
        raise UserError("convert: give --from, or --llm, perhaps with --vision")
    if vision and not llm:
        raise UserError("convert: --vision needs --llm, the decoder; --from converts an encoder by itself")
    changes = override("convert", stage_config(preset_of(preset)).lock(), overrides)
    options: dict[str, Any] = {
        "format": format,
        "dtype": dtype,
        "tokenizer": str(local(tokenizer, weights=False)) if tokenizer else None,
        "seed": seed,
        "lora": str(local(lora)) if lora else None,
        "base": str(local(base)) if base else None,
    }
    options |= {"quantize": quantize, "ema": ema, "parts_alone": bool(llm)}
    model = {"preset": preset, "overrides": changes}
    sources = [path for path in (vision, llm) if path]
    if source:  # a file's name may have a comma
        sources = [source] if Path(source).exists() else listed(source)
    sources = [str(local(path)) for path in sources]
    checks = {"media": video, "query": query} if verify else None
    convert_and_verify(sources, to, options, model, checks)


def convert_and_verify(
    sources: list[str], target: str, options: dict[str, Any], model: dict[str, Any], checks: dict[str, Any] | None
) -> None:
    """Convert with `options` and `model`; with `checks` (options of `verify_all`) compare each source with the target.

    With `checks` an existing target is not written again. Raises UserError.
    """
    from kangaroo_jax.conversion.convert import convert as convert_files

    if checks is not None:
        from kangaroo_jax.conversion.files import import_torch
        from kangaroo_jax.conversion.lora import layout_of

        if options["lora"] or any(layout_of(source) for source in sources):
            raise UserError(
                "--verify compares models that are the same: convert with --lora first, then --from=THAT --verify"
            )
        import_torch("the comparison is run in torch")
    if checks is None or not Path(target).exists():
        convert_files(sources, target, **options, **model)
    if checks is not None:
        from kangaroo_jax.conversion.verify import QUESTION, verify_all

        verify_all(sources, target, media=checks["media"], query=checks["query"] or QUESTION, **model)


COMMANDS = {"": convert}
