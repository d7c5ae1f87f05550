"""`kangaroo bench NAME`: measures parts of the program on this machine; each bench is a module of `bench`."""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kangaroo_jax.bench.flags import positive
from kangaroo_jax.bench.train import bench_train, bench_vision, compare_with_torch, torch_config
from kangaroo_jax.chips import find_chip
from kangaroo_jax.config_files import load_config
from kangaroo_jax.system.memory import keep_freed_memory
from kangaroo_jax.training.placement import resolve

HERE = {
    "train": "a stage's train step: [--config=STAGE:PRESET] [--packs=N] [--steps=N]",
    "vision": "the ViT alone: [--config=STAGE:PRESET] [--frames=N] [--steps=N]",
    "train-vs-torch": "a model of 100M parameters against the same in plain PyTorch: [--steps=N] [--rounds=N]",
    "convert": "converting a checkpoint both ways, beside plain copies: [--folder=DIR] [--layers=N]",
}
ELSEWHERE = {  # with a module of their own, which may need more, and flags of their own: kangaroo bench NAME --help
    "data": "how fast videos become batches, beside torchcodec, decord and OpenCV",
    "packing": "how full rows get on made-up samples: [--config STAGE:PRESET ...] [--row=TOKENSxFRAMES]",
    "checkpoint": "how long a save holds training up, and what memory it needs",
    "annotate": "requests a second of the client of annotation, against a server that fails on purpose",
    "curate": "CPU seconds of each stage of curation, and two workers against one: --input=...",
}


def bench_config(arguments: argparse.Namespace) -> ConfigDict:
    """The config that the arguments ask for, placed on one device."""
    config = load_config(arguments.config)
    with config.unlocked():
        config.train.mesh = (1, 1, 1, 1)
        if arguments.packs:
            config.data.packs_per_batch = arguments.packs
        if arguments.moment_dtype:
            config.optimizer.moment_dtype = arguments.moment_dtype
    return resolve(config, find_chip(jax.devices()[0].device_kind), 1)


def main(argv: Sequence[str]) -> None:
    """Run the benchmark that the first argument names, of `HERE` or `ELSEWHERE`. Raises UserError."""
    if argv and argv[0] in ELSEWHERE:
        return importlib.import_module(f"kangaroo_jax.bench.{argv[0]}").main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="kangaroo bench",
        description="Measure parts of the program on this machine.\n\nbenchmarks:\n"
        + "".join(f"  {name:15} {line}\n" for name, line in (HERE | ELSEWHERE).items()),
        epilog="Of " + ", ".join(ELSEWHERE) + " the flags are listed by kangaroo bench NAME --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=(*HERE, *ELSEWHERE), metavar="BENCHMARK", help="a name of the list above")
    parser.add_argument("--config", default="stage4_instruct:tiny", help="train and vision: a stage and a preset")
    parser.add_argument("--packs", type=int, default=0, help="train: packs a step, instead of the config's")
    parser.add_argument("--frames", type=positive, default=64, help="vision: frames a call")
    parser.add_argument("--moment_dtype", default="", help="train: of Adam's moments, instead of the config's")
    parser.add_argument("--steps", type=positive, default=10, help="steps that are measured (of each, in each round)")
    parser.add_argument("--rounds", type=positive, default=3, help="train-vs-torch: how often the two take turns")
    parser.add_argument("--segments", type=positive, default=1, help="train-vs-torch: samples packed into a row")
    parser.add_argument("--folder", default="bench_convert", help="convert: an empty folder on the disk to measure")
    parser.add_argument(
        "--layers",
        type=positive,
        default=32,
        help="convert: of the decoder; 32 is the 8B model, 17 GB, for which 69 GB must be free",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    config = bench_config(arguments)
    result: dict[str, Any]
    if arguments.what == "convert":
        from kangaroo_jax.bench.convert import bench_convert, published_sizes

        result = bench_convert(Path(arguments.folder), published_sizes(arguments.layers))
    elif arguments.what == "train":
        result = bench_train(config, arguments.steps)
    elif arguments.what == "vision":
        result = bench_vision(config, arguments.steps, arguments.frames)
    else:
        result = compare_with_torch(torch_config(), arguments.steps, arguments.rounds, arguments.segments)
    print(json.dumps(result) if arguments.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))
