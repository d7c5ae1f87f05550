"""Kangaroo, a video-language model for long videos, in JAX.

>>> from kangaroo_jax import Kangaroo
>>> answer, history = Kangaroo.load("runs/quickstart/stage5_long_video").chat(video="a.mp4", query="What happens?")

Names are imported when they are first used, so that `import kangaroo_jax` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Kangaroo", "__version__", "load_video", "sample_frames"]

_PUBLIC = {
    "Kangaroo": ("kangaroo_jax.inference.chat", "Kangaroo"),
    "load_video": ("kangaroo_jax.data.media.video", "load_video"),
    "sample_frames": ("kangaroo_jax.data.media.video", "sample_times"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
