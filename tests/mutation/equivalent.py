"""Mutants that change nothing that a test could see: "path | line | changed line" -> why."""

EQUIVALENT: dict[str, str] = {
    "kangaroo_jax/models/attention_splash.py | return np.array([[queries.max() >= first, queries.min() >= last - 1]])"
    " | return np.array([[queries.max() > first, queries.min() >= last - 1]])": "the last query of a block is never "
    "the first key of one: both sizes are multiples of 128",
}
