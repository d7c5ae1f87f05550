"""Annotation: three captioners look at key frames, one model writes the captions. `kangaroo annotate` takes it."""

from ml_collections import ConfigDict

from kangaroo_jax.curation.annotate.config import annotation_config


def get_config(preset: str = "endpoint") -> ConfigDict:
    """`endpoint` (OpenAI-compatible servers), `own` (a Kangaroo captions in this process) or `corpus` (rules)."""
    return annotation_config(preset)
