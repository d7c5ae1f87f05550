"""Instruction sets: the paper's mix of captions, questions and conversations. `kangaroo instruct` takes it."""

from ml_collections import ConfigDict

from kangaroo_jax.curation.instruct.config import instruct_config


def get_config(preset: str = "endpoint") -> ConfigDict:
    """`endpoint` (OpenAI-compatible servers), `corpus` (rules on a generated corpus) or `captions` (nothing else)."""
    return instruct_config(preset)
