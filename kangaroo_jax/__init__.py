"""Kangaroo, a video-language model for long videos, in JAX.

>>> from kangaroo_jax import Kangaroo, convert, load_config, train
>>> train(load_config("stage3_refine:tiny"), "runs/refine")  # a ConfigDict, whose keys can be set
>>> convert(["runs/refine"], "export")  # for PyTorch
>>> answer, history = Kangaroo.load("runs/quickstart/stage5_long_video").chat(video="a.mp4", query="What happens?")

Names are imported when they are first used, so that `import kangaroo_jax` costs nothing.
"""

TYPE_CHECKING = False  # nothing is imported here: until the command line can answer, Ctrl-C prints a traceback
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = ["Kangaroo", "__version__", "convert", "load_config", "load_video", "sample_times", "train"]

_PUBLIC = {
    "Kangaroo": ("kangaroo_jax.inference.chat", "Kangaroo"),
    "convert": ("kangaroo_jax.conversion.convert", "convert"),
    "load_config": ("kangaroo_jax.config_files", "load_config"),
    "load_video": ("kangaroo_jax.data.media.video", "load_video"),
    "sample_times": ("kangaroo_jax.data.media.video", "sample_times"),
    "train": ("kangaroo_jax.training.loop", "train"),
}
_RENAMED = {"sample_frames": "sample_times"}


def __getattr__(name: str) -> "Any":
    import importlib

    if name in _RENAMED:
        import warnings

        warnings.warn(f"kangaroo_jax.{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(__name__), _RENAMED[name])
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
