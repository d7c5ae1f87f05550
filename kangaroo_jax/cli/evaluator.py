"""What a training job hands to the loop for `config.eval.benchmarks`; it is imported only where there are some."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kangaroo_jax.config import StageConfig
    from kangaroo_jax.training.measuring import Evaluator


def evaluator(config: "StageConfig") -> "Evaluator":
    """Who scores this stage's checkpoints. Raises UserError."""
    from kangaroo_jax.evaluation.while_training import BenchmarkEvaluator

    return BenchmarkEvaluator(config)
