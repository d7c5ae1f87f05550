"""Which tests hold which file: those that name a fault soonest come first."""

_MODELS = "tests/models/"
_TRAINING = "tests/training/"


def _of(folder: str, names: str) -> list[str]:
    return [f"{folder}test_{name}.py" for name in names.split()]


ROOMS: dict[str, dict[str, list[str]]] = {
    "models": {
        "kangaroo_jax/models/attention.py": _of(_MODELS, "attention attention_kernels"),
        "kangaroo_jax/models/attention_context.py": _of(_MODELS, "attention_kernels"),
        "kangaroo_jax/models/attention_splash.py": _of(_MODELS, "splash_blocks attention_kernels"),
        "kangaroo_jax/models/attention_tokamax.py": _of(_MODELS, "attention_triton"),
        "kangaroo_jax/models/attention_triton.py": _of(_MODELS, "attention_triton"),
        "kangaroo_jax/models/eva_clip.py": _of(_MODELS, "layers parity initial"),
        "kangaroo_jax/models/kangaroo.py": _of(_MODELS, "initial kangaroo"),
        "kangaroo_jax/models/layers.py": _of(_MODELS, "layers parity initial"),
        "kangaroo_jax/models/llama.py": _of(_MODELS, "parity initial kangaroo"),
        "kangaroo_jax/models/losses.py": _of(_MODELS, "losses"),
        "kangaroo_jax/models/parameters.py": _of(_TRAINING, "parameters"),
        "kangaroo_jax/models/patchify.py": _of(_MODELS, "layers parity initial"),
        "kangaroo_jax/models/stack.py": _of(_MODELS, "layers initial"),
    },
    "training": {
        f"kangaroo_jax/training/{name}.py": _of(_TRAINING, tests)
        for name, tests in {
            "array_writing": "checkpoint frozen",
            "check": "check",
            "checkpoint": "checkpoint frozen folders going_on resume stopping",
            "curriculum": "curriculum loop",
            "distributed": "watchdog stopping distributed",
            "flops": "observe",
            "frozen": "frozen checkpoint",
            "host_rows": "host_rows meshes",
            "initial": "loop going_on frozen",
            "loop": "folders loop stopping going_on meshes resume",
            "metrics": "metrics",
            "observe": "observe",
            "optimizer": "optimizer",
            "placement": "placement",
            "reporting": "stopping loop going_on",
            "resume": "going_on",
            "state": "state meshes",
            "step": "step state meshes",
            "stopping": "stopping watchdog folders going_on",
        }.items()
    },
    "checkpoints": {
        "kangaroo_jax/checkpoints/digests.py": _of(_TRAINING, "going_on frozen"),
        "kangaroo_jax/checkpoints/frozen.py": _of(_TRAINING, "frozen"),
        "kangaroo_jax/checkpoints/reading.py": [
            *_of(_TRAINING, "checkpoint folders going_on frozen"),
            "tests/inference/test_chat.py",
        ],
    },
    "packing": {"kangaroo_jax/data/batches/packing.py": _of("tests/data/", "packing resume")},
    "mixture": {"kangaroo_jax/data/batches/mixture.py": _of("tests/data/", "mixture shuffle")},
    "names": {"kangaroo_jax/conversion/names.py": _of("tests/conversion/", "names")},
}
