"""Mutants that change nothing that a test could see: "path | line | changed line" -> why."""

EQUIVALENT: dict[str, str] = {
    "kangaroo_jax/models/attention_splash.py | return np.array([[queries.max() >= first, queries.min() >= last - 1]])"
    " | return np.array([[queries.max() > first, queries.min() >= last - 1]])": "the last query of a block is never "
    "the first key of one: both sizes are multiples of 128",
    "kangaroo_jax/models/attention_splash.py | PADDING = -1  # segment of the padding | PADDING = -2  # segment of the "
    "padding": "any number does that no sample's segment has",
    "kangaroo_jax/models/stack.py | layers = zip(*(jax.lax.split(leaf, (1,) * depth) for leaf in leaves), strict=True)"
    " | layers = zip(*(jax.lax.split(leaf, (1,) * depth) for leaf in leaves))": "each has `depth` parts",
    "kangaroo_jax/models/llama.py | scan: bool = True, | scan: bool = False,": "unrolled layers give the same",
    "kangaroo_jax/training/metrics.py | seconds = max(now - self._clock, 1e-9)"
    " | seconds = max(now - self._clock, 2e-09)": "no two readings of a clock are so near with a step between them",
    "kangaroo_jax/models/parameters.py | by_path = {path: leaf for path, leaf in zip(self._paths, leaves, "
    "strict=True)} | by_path = {path: leaf for path, leaf in zip(self._paths, leaves)}": "both are of the same state",
    "kangaroo_jax/models/losses.py | order = jnp.argsort(weights == 0, axis=1, stable=True)"
    " | order = jnp.argsort(weights == 0, axis=1)": "JAX sorts stably where nothing is said",
    "kangaroo_jax/models/attention.py | if queries.segments is not None and keys.segments is not None:"
    " | if queries.segments is not None or keys.segments is not None:": "segments are a pair of both, or None",
    'kangaroo_jax/training/distributed.py | thread = threading.Thread(target=watch, name="waiting", daemon=True)'
    ' | thread = threading.Thread(target=watch, name="waiting")': "the block that starts it always ends it",
    "kangaroo_jax/models/parameters.py | "
    "return Binding(nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(0))))"
    " | return Binding(nnx.eval_shape(lambda: KangarooModel(config, rngs=nnx.Rngs(1))))": "a seed has no say in shapes",
}
