"""`kangaroo train`."""

from kangaroo_jax.cli.arguments import Overrides


def train(*, config: str, workdir: str, strict: bool = False, overrides: Overrides = ()) -> None:
    """Train one stage from a config file; --config.KEY=VALUE changes it.

        kangaroo train --config=stage3_refine:tiny --workdir=runs/refine --config.train.steps=100

    Stages (FILE): stage1_image_pretrain, stage2_video_pretrain, stage3_refine, stage4_instruct or
    stage5_long_video, or a path of yours.
    Presets: kangaroo_8b (the published sizes), base_100m (benchmarks), tiny (CPU).

    Every key of the config is a flag: --config.train.steps=100 --config.optimizer.learning_rate=1e-4
    --config.data.train='("a.jsonl",)'. If a key is given twice, the last value counts. config.json in a
    work folder lists all keys.

    Args:
        config: FILE[:PRESET], such as configs/stage3_refine.py:tiny
        workdir: folder for checkpoints, metrics and pictures
        strict: stop at the first sample that cannot be read
    """
    from pathlib import Path

    from kangaroo_jax.cli.evaluator import evaluator
    from kangaroo_jax.cli.overrides import config_of
    from kangaroo_jax.system.files import make_folder

    stage = config_of("train", config, overrides)
    if strict:
        stage.data.strict = True
    folder = make_folder(Path(workdir))

    from kangaroo_jax.training.distributed import initialize

    initialize()

    from kangaroo_jax.config import StageConfig
    from kangaroo_jax.planning.here import explained_memory
    from kangaroo_jax.training import loop

    with explained_memory(StageConfig.from_config(stage)):
        loop.train(stage, folder, evaluator=evaluator)


COMMANDS = {"": train}
