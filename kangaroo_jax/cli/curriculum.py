"""`kangaroo curriculum`."""

from pathlib import Path
from typing import Any

from kangaroo_jax.cli.arguments import Overrides


def curriculum(*, workdir: str, data: str, tokenizer: str, preset: str = "tiny", overrides: Overrides = ()) -> None:
    """Train all five stages, each from the last one's weights.

        kangaroo curriculum --preset=tiny --workdir=runs/c --data=FOLDER --tokenizer=FILE

    Every key of the configs is a flag, --config.KEY=VALUE, for all stages: --config.train.steps=100
    --config.optimizer.learning_rate=1e-4. If a key is given twice, the last value counts.

    Args:
        workdir: folder in which every stage gets its own
        data: folder with stage1.jsonl ... stage5.jsonl and the media they name
        tokenizer: tokenizer.json, tokenizer.model or a SentencePiece model
        preset: sizes of the model: kangaroo_8b, base_100m or tiny
    """
    from kangaroo_jax.cli.evaluator import evaluator
    from kangaroo_jax.cli.overrides import override, preset_of
    from kangaroo_jax.config import stage_config
    from kangaroo_jax.system.files import make_folder

    preset = preset_of(preset)
    changes = override("curriculum", stage_config(preset).lock(), overrides)
    folder = make_folder(Path(workdir))

    from kangaroo_jax.training.distributed import initialize

    initialize()

    from kangaroo_jax.planning.here import explained_memory
    from kangaroo_jax.training import curriculum

    options: dict[str, Any] = dict(overrides=changes, evaluator=evaluator, explained=explained_memory)
    curriculum.run(preset, folder, data=data, tokenizer=tokenizer, **options)


COMMANDS = {"": curriculum}
