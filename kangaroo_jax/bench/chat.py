"""`kangaroo bench chat`: the engine beside transformers' `generate`, same weights and prompts, in turn in one run.

Prompts hold vision tokens, as embeddings that are given: both sides are measured from these on. CPU seconds are those
of the process, which others on the machine disturb less than the clock. Needs the extra `convert`.
"""

import statistics
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kangaroo_jax.config import ModelConfig, model_config
from kangaroo_jax.data.media.video import MediaRef
from kangaroo_jax.errors import UserError
from kangaroo_jax.inference.engine import Engine
from kangaroo_jax.inference.given import Given
from kangaroo_jax.inference.requests import Event, Request
from kangaroo_jax.inference.sizes import Sizes
from kangaroo_jax.models.kangaroo import KangarooModel
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.progress import Tell

SHARE = 0.75  # of a prompt that are vision tokens
FIRST = 11  # id of the first token that is text

Measured = tuple[list[float], list[float], list[list[int]]]  # CPU seconds of a prompt and of steps, tokens of each row


def bench_chat(
    preset: str, batches: Iterable[int], prompts: Iterable[int], new: int, rounds: int, tell: Tell
) -> list[dict[str, float]]:
    """A row for each number of conversations and length of their prompts; see `table`. Raises UserError."""
    config = model_config(preset)
    config.dtype = "float32"
    model = random_model(config)
    theirs = Transformers(model, config)
    rows = []
    for batch in batches:
        for prompt in prompts:
            classes = ((-(-(prompt + new) // 128) * 128 + 128, batch),)
            sizes = Sizes(classes, rows=tuple(sorted({1, batch})), frames=2)
            ours = Ours(model, sizes)
            measured: dict[str, list[Measured]] = {"engine": [], "transformers": []}
            for number in range(rounds + 1):  # the first compiles
                tokens, vision = made_up(number, batch, prompt, config.llm)
                for name, side in (("engine", ours), ("transformers", theirs)):
                    result = side.measure(tokens, vision, new)
                    if number:
                        measured[name].append(result)
            ours.engine.close()
            rows.append(_row(batch, prompt, measured))
            tell(line(rows[-1]))
    return rows


def random_model(config: Any) -> KangarooModel:
    """A model with random weights, of a ViT that is never run as little as there can be; its layers are unstacked."""
    config.vision.update(depth=1)
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: KangarooModel(ModelConfig.from_config(config), rngs=nnx.Rngs(0))))

    def draw(weight: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(weight.shape, dtype=np.float32) * 0.04)

    model: KangarooModel = nnx.merge(graph, jax.tree.map(draw, state))
    return model.unstack()


def made_up(seed: int, batch: int, prompt: int, llm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[B, T] of which -1 are vision tokens, and these [B, R, D]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(FIRST, llm.vocab_size, (batch, prompt)).astype(np.int32)
    count = int(SHARE * prompt)
    tokens[:, 8 : 8 + count] = -1
    return tokens, rng.standard_normal((batch, count, llm.width)).astype(np.float32)


class Ours:
    """The engine."""

    def __init__(self, model: KangarooModel, sizes: Sizes) -> None:
        self._vision: dict[str, np.ndarray] = {}
        self.engine = Engine(model, sizes, vision=lambda _: Given(self._vision))

    def measure(self, tokens: np.ndarray, vision: np.ndarray, new: int) -> Measured:
        """Prompts read with one token each, then answers of `new` tokens to the same prompts, which are remembered."""
        names = [f"{id(tokens)}-{row}" for row in range(len(tokens))]
        self._vision |= dict(zip(names, vision, strict=True))

        def ask(count: int) -> list[Request]:
            refs = [MediaRef("video", name, (0.0,)) for name in names]
            return [Request(np.maximum(row, 0), row < 0, (ref,), count) for row, ref in zip(tokens, refs, strict=True)]

        begun = time.process_time()
        for ticket in [self.engine.submit(request) for request in ask(1)]:
            ticket.result()
        prompt = time.process_time() - begun
        ticks: list[float] = []
        tickets = [self.engine.submit(request) for request in ask(new)]
        tickets[-1].add_listener(lambda told: ticks.append(time.process_time()) if isinstance(told, Event) else None)
        answers = [list(ticket.result().ids) for ticket in tickets]
        return [prompt], np.diff(ticks).tolist(), answers


class Transformers:
    """A Llama of transformers with the same weights."""

    def __init__(self, model: KangarooModel, config: Any) -> None:
        """Raises UserError where it is not installed."""
        try:
            import torch
            from transformers import LlamaForCausalLM

            from kangaroo_jax.bench.torch_kangaroo import llama_config
        except ImportError:
            raise UserError(f"bench chat compares with transformers: {install_line('convert')}") from None
        torch.set_num_threads(usable_cpus())
        self._torch: Any = torch
        self._model: Any = LlamaForCausalLM(llama_config(config.llm, max_position_embeddings=1 << 20)).eval()
        self._model.load_state_dict({name: torch.from_numpy(array) for name, array in _state(model)}, strict=True)

    def measure(self, tokens: np.ndarray, vision: np.ndarray, new: int) -> Measured:
        """As `Ours.measure`, by `generate`."""
        torch = self._torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        with torch.no_grad():
            embeddings = self._model.model.embed_tokens(torch.from_numpy(np.maximum(tokens, 0)))
            embeddings[torch.from_numpy(tokens < 0)] = torch.from_numpy(vision.reshape(-1, vision.shape[-1]))
        ticks: list[float] = []

        class Tick(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                ticks.append(time.process_time())
                return torch.zeros(len(tokens), dtype=torch.bool)

        begun = time.process_time()
        with torch.no_grad():
            ids = self._model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones(tokens.shape, dtype=torch.long),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Tick()]),
            )
        return [ticks[0] - begun], np.diff(ticks).tolist(), ids.tolist()


def _state(model: KangarooModel) -> Iterable[tuple[str, np.ndarray]]:
    """The decoder's weights by transformers' names."""

    def turned(kernel: Any, contracted: int) -> np.ndarray:
        array = np.asarray(kernel[...])
        return np.ascontiguousarray(array.reshape(int(np.prod(array.shape[:contracted])), -1).T)

    yield "model.embed_tokens.weight", np.array(model.llm.embedding[...])
    yield "model.norm.weight", np.array(model.llm.norm.scale[...])
    if model.llm.head is not None:
        yield "lm_head.weight", turned(model.llm.head.kernel, 1)
    layers: Any = model.llm.layers
    for number, layer in enumerate(layers):
        name = f"model.layers.{number}."
        yield name + "input_layernorm.weight", np.array(layer.attention_norm.scale[...])
        yield name + "post_attention_layernorm.weight", np.array(layer.mlp_norm.scale[...])
        for part, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            yield f"{name}self_attn.{part}_proj.weight", turned(getattr(layer.attention, ours).kernel, 1)
        yield f"{name}self_attn.o_proj.weight", turned(layer.attention.out.kernel, 2)
        for part in ("gate", "up", "down"):
            yield f"{name}mlp.{part}_proj.weight", turned(getattr(layer.mlp, part).kernel, 1)


def _row(batch: int, prompt: int, measured: dict[str, list[Measured]]) -> dict[str, float]:
    row: dict[str, float] = {"batch": batch, "prompt": prompt}
    for name, results in measured.items():
        row[f"{name} prompt s"] = statistics.median(seconds for one in results for seconds in one[0])
        row[f"{name} step ms"] = 1e3 * statistics.median(seconds for one in results for seconds in one[1])
    row["prompt ratio"] = row["engine prompt s"] / row["transformers prompt s"]
    row["decode ratio"] = row["transformers step ms"] / row["engine step ms"]
    pairs = [
        (a, b)
        for one, other in zip(measured["engine"], measured["transformers"], strict=True)
        for mine, yours in zip(one[2], other[2], strict=True)
        for a, b in zip(mine, yours, strict=True)
    ]
    row["same tokens"] = sum(a == b for a, b in pairs) / len(pairs)
    return row


def line(row: dict[str, float]) -> str:
    """One row in words. Ratios: time of a prompt by transformers' (below 1 is quicker), tokens a second by its."""
    prompts, steps = (
        [row[f"{name} {what}"] for name in ("engine", "transformers")] for what in ("prompt s", "step ms")
    )
    return (
        f"{row['batch']:.0f} conversations of {row['prompt']:.0f} tokens: "
        f"prompt {prompts[0]:.2f} s of CPU, transformers {prompts[1]:.2f} ({row['prompt ratio']:.2f} of its time); "
        f"step {steps[0]:.1f} ms, transformers {steps[1]:.1f} ({row['decode ratio']:.2f} times its tokens a second); "
        f"{row['same tokens']:.1%} of the tokens are the same"
    )
