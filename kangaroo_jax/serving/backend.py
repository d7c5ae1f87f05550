"""What answers: the engine with its model, the decoder of media, and how prompts are made."""

import collections
import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from kangaroo_jax.config import frames_per_group, tokens_per_group
from kangaroo_jax.data.media.decode import ProcessDecoder
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.data.tokenizer import Tokenizer
from kangaroo_jax.errors import UserError
from kangaroo_jax.hub import local
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.grammars import Grammars
from kangaroo_jax.inference.memories import check_kv_dtype
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.serving.limits import MIB, Limits
from kangaroo_jax.serving.prompts import Prompts
from kangaroo_jax.serving.rehearsal import rehearse
from kangaroo_jax.system.memory import Bounded
from kangaroo_jax.system.progress import Tell, silent

_NO_FILE = "/nowhere/at all"


@dataclasses.dataclass(frozen=True)
class Backend:
    """A model that is ready to answer."""

    engine: Engine
    tokenizer: Tokenizer
    prompts: Prompts
    context: int  # tokens of a conversation
    decoder: ProcessDecoder
    grammars: Grammars
    adapters: Mapping[str, Engine] = dataclasses.field(default_factory=dict)  # by the name of their model

    def engine_of(self, name: str) -> Engine:
        """What answers as the model `name`."""
        return self.adapters.get(name, self.engine)

    @property
    def failed(self) -> str | None:
        """Why an engine goes on no more."""
        return next((one.failed for one in (self.engine, *self.adapters.values()) if one.failed is not None), None)

    def stats(self) -> dict[str, int]:
        """`Engine.stats`, summed over all engines, and the decoding processes that were replaced."""
        total = collections.Counter(self.engine.stats())
        for one in self.adapters.values():
            total.update(one.stats())
        return {**total, "decode_workers_replaced": self.decoder.replaced}

    def close(self) -> None:
        """End the engines and the processes."""
        for one in (self.engine, *self.adapters.values()):
            one.close()
        self.grammars.close()
        self.decoder.close()


@dataclasses.dataclass(frozen=True)
class Choices:
    """How the model is held."""

    checkpoint: str
    dtype: str | None = None
    quantize: str | None = None
    kv_dtype: str | None = None
    ema: bool = False  # the average of what was trained last: of the adapters, where there are some
    context: int = 0  # tokens of a conversation; 0: of the longest sample in training
    slots: int = 4  # conversations of that length at the same time
    host_cache_gib: float = 4.0  # conversations that lost their slot
    vision_cache_gib: float = 2.0  # vision tokens of media that were seen
    workers: int = 2  # processes that decode
    loras: tuple[tuple[str, str], ...] = ()  # (name of a model, folder of its adapter beside the checkpoint)


def open_backend(choices: Choices, limits: Limits, step: Tell = silent) -> Backend:
    """Load and compile all, and rehearse. `step` is told what is being done. Raises UserError."""
    from kangaroo_jax.checkpoints.adapters import open_adapter
    from kangaroo_jax.inference.adapters import adapted, load_adapted
    from kangaroo_jax.inference.compiled import keep_programs
    from kangaroo_jax.inference.text import Detokenizer
    from kangaroo_jax.inference.vision import Vision
    from kangaroo_jax.inference.weights import Loaded

    check_kv_dtype(choices.kv_dtype)
    keep_programs()
    step(f"loading {Path(choices.checkpoint)}")
    opened = {name: open_adapter(folder, choices.ema) for name, folder in choices.loras}
    ema = choices.ema and not opened
    loaded = load_adapted(local(choices.checkpoint), dtype=choices.dtype, quantize=choices.quantize, ema=ema)
    several = {name: adapted(loaded, one) for name, one in opened.items()}  # they share the arrays of `loaded`
    config, model = loaded.config, loaded.config.model
    decoder = ProcessDecoder(
        choices.workers, limits.max_decode_seconds, prepare=Bounded(limits.max_decoder_mb * MIB).begin
    )
    context = choices.context or min(config.data.max_sample_tokens, config.data.tokens_per_pack)
    per_group, tokens = frames_per_group(model), tokens_per_group(model, config.data.image_size)
    prompts = Prompts(loaded.tokenizer, config.data, per_group, tokens, decoder.probe, limits)

    def engine_of(one: Loaded) -> Engine:
        return Engine(
            one.model,
            Sizes.for_context(context, choices.slots),
            vision=lambda programs: Vision(
                programs.encode,
                decoder,
                image_size=config.data.image_size,
                frames_per_group=per_group,
                tokens_per_group=tokens,
                frames_a_call=programs.frames_a_call,
                weights_id=one.weights_id,
                cache_bytes=int(choices.vision_cache_gib * (1 << 30)),
                pieces=choices.workers,
            ),
            detokenizer=lambda stop: Detokenizer(loaded.tokenizer, stop),
            host_bytes=int(choices.host_cache_gib * (1 << 30)),
            kv_dtype=choices.kv_dtype,
        )

    engine, adapters = engine_of(loaded), {name: engine_of(one) for name, one in several.items()}
    step(f"starting what decodes media, {choices.workers} at a time")
    with contextlib.suppress(UserError):  # there is no such file, but the first request will not wait for a process
        decoder.probe(_NO_FILE, "image")
    decoder.submit(MediaRef("image", _NO_FILE, (0.0,)), config.data.image_size).result()
    step("compiling")
    programs = sum(one.warm_up(config.data.image_size, step) for one in (engine, *adapters.values()))
    step("rehearsing")
    rehearse((engine, *adapters.values()), prompts, limits, context, max(choices.slots, choices.workers))
    step(f"ready, {programs} programs")
    grammars = Grammars(loaded.tokenizer, engine.programs.vocabulary)
    return Backend(engine, loaded.tokenizer, prompts, context, decoder, grammars, adapters)
