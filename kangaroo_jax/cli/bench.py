"""`kangaroo bench NAME`: measures parts of the program on this machine; the code is in `kangaroo_jax.bench`."""

import json as json_text
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kangaroo_jax.cli.arguments import Count, Natural, Number, Overrides, Several, listed
from kangaroo_jax.errors import UserError
from kangaroo_jax.system.progress import silent


def train(
    *,
    config: str = "stage4_instruct:tiny",
    steps: Count = 10,
    packs: Natural = 0,
    moment_dtype: str = "",
    segments: Count = 1,
    profile: str = "",
    json: bool = False,
    overrides: Overrides = (),
) -> None:
    """Measure a stage's train step.

        kangaroo bench train --config=stage4_instruct:tiny --steps=10

    Every key of the config is a flag, --config.KEY=VALUE.

    Args:
        config: STAGE:PRESET
        steps: number of measured steps
        packs: packs in a step; 0 is the config's number
        moment_dtype: type of Adam's moments; by default the config's
        segments: samples in a row
        profile: folder for a trace of one step
        json: print JSON
    """
    _begin()
    from kangaroo_jax.bench.train import bench_config, bench_train
    from kangaroo_jax.cli.overrides import stage_of

    stage = stage_of("bench train", config, overrides)
    _show(bench_train(bench_config(stage, packs, moment_dtype), steps, segments, profile), json)


def vision(*, config: str = "stage4_instruct:tiny", frames: Count = 64, steps: Count = 10, json: bool = False) -> None:
    """Measure the ViT alone.

        kangaroo bench vision --config=stage4_instruct:tiny --frames=64

    Args:
        config: STAGE:PRESET
        frames: frames in a call
        steps: number of measured calls
        json: print JSON
    """
    _begin()
    from kangaroo_jax.bench.train import bench_config, bench_vision
    from kangaroo_jax.config import StageConfig

    _show(bench_vision(bench_config(StageConfig.load(config)), steps, frames), json)


def train_vs_torch(*, steps: Count = 10, rounds: Count = 3, segments: Count = 1, json: bool = False) -> None:
    """Measure a model of 100M parameters against the same in plain PyTorch.

        kangaroo bench train-vs-torch --steps=10 --rounds=3

    Args:
        steps: measured steps of each in a round
        rounds: number of turns of the two
        segments: samples packed into a row
        json: print JSON
    """
    _begin()
    from kangaroo_jax.bench.train import compare_with_torch, torch_config

    _show(compare_with_torch(torch_config(), steps, rounds, segments), json)


def convert(*, folder: str = "bench_convert", layers: Count = 32, json: bool = False) -> None:
    """Measure converting a checkpoint both ways, against plain copies.

        kangaroo bench convert --folder=DIR

    Args:
        folder: an empty folder on the disk to measure
        layers: decoder layers; 32 is the 8B model, 17 GB, which needs 69 GB of free disk
        json: print JSON
    """
    _begin()
    from kangaroo_jax.bench.convert import bench_convert, published_sizes

    _show(bench_convert(Path(folder), published_sizes(layers)), json)


def data(
    *,
    lengths: str = "10s,3min,20min",
    frames: str = "8,64,160",
    folder: str = "bench_videos",
    rounds: Count = 3,
    workers: Count = 2,
    own_resize: bool = False,
    costs: bool = False,
    out: str = "",
) -> None:
    """Measure the speed of turning videos into batches, against torchcodec, decord and OpenCV.

        kangaroo bench data --lengths=10s --frames=8,64

    Every reader gets the same files and frame numbers, resizes to the same letterboxed size and fills a batch, in two
    worker processes; the readers take turns. Readers that are not installed are left out.

    Args:
        lengths: lengths of the videos, comma-separated
        frames: frames of a clip, comma-separated
        folder: folder for the videos, which are made once
        rounds: number of turns of the readers
        workers: number of processes
        own_resize: let the others resize in their fastest way, not with torch's antialiased bicubic filter
        costs: only measure a seek and a decoded frame, by which the reader chooses between the two
        out: JSON file for the rows
    """
    from kangaroo_jax.bench import data as bench

    unknown = set(listed(lengths)) - bench.LENGTHS.keys()
    if unknown or not listed(lengths):
        raise UserError(f"bench data: --lengths={lengths}: must be of {', '.join(bench.LENGTHS)}")
    if costs:
        print(json_text.dumps(bench.costs(Path(folder))))
        return
    counts = [int(n) for n in listed(frames) if n.isascii() and n.isdigit() and int(n)]
    if len(counts) != frames.count(",") + 1:
        raise UserError(f"bench data: --frames={frames} must be numbers of frames, such as 8,64,160")
    rows = bench.compare(Path(folder), listed(lengths), counts, rounds, workers, own_resize)
    print(bench.summary(rows, workers))
    if out:
        Path(out).write_text(json_text.dumps(rows, indent=1), encoding="utf-8")


def batches(
    *, config: str = "stage4_instruct:tiny", batches: Count = 8, json: bool = False, overrides: Overrides = ()
) -> None:
    """Measure how fast this machine makes a stage's batches of your data, for kangaroo plan --frames-a-cpu.

        kangaroo bench batches --config=stage5_long_video:kangaroo_8b --config.data.train=mine.jsonl

    Nothing trains. Every key of the config is a flag, --config.KEY=VALUE.

    Args:
        config: STAGE:PRESET
        batches: number of measured batches, after a first one
        json: print JSON
    """
    _begin()
    from kangaroo_jax.bench.batches import bench_batches
    from kangaroo_jax.cli.overrides import stage_of

    stage = stage_of("bench batches", config, overrides)
    _show(bench_batches(stage, batches, silent if json else print), json)


def packing(
    *,
    config: Several = None,
    row: str = "",
    samples: Count = 10_000,
    seed: Natural = 0,
    json: bool = False,
) -> None:
    """Measure how full rows get with synthetic samples of the paper's stages.

        kangaroo bench packing --config stage4_instruct:kangaroo_8b --row=20480x144

    Args:
        config: STAGE:PRESET, one or more, by default stages 3 to 5
        row: TOKENSxFRAMES, such as 20480x144; by default the config's
        samples: synthetic samples for each
        seed: seed of the samples
        json: print JSON
    """
    from kangaroo_jax.bench.packing import bench_rows, table

    results = bench_rows(config or [], row, samples, seed, tell=silent if json else print)
    print(json_text.dumps(results) if json else table(results))


def checkpoint(*, folder: str = ".", gib: Number = 1.0, rounds: Count = 5) -> None:
    """Measure how long a save blocks training, and the memory it needs.

        kangaroo bench checkpoint --gib=1.1

    Args:
        folder: a folder on the disk to measure; what is written is removed
        gib: size of the state
        rounds: number of saves
    """
    if not Path(folder).is_dir() or not gib:
        raise UserError("bench checkpoint: --folder must be there and --gib above 0")
    from kangaroo_jax.bench.checkpoint import bench_checkpoint

    with tempfile.TemporaryDirectory(dir=folder) as name:
        print(json_text.dumps(bench_checkpoint(Path(name), gib, rounds)))


def annotate(
    *, requests: Count = 5000, in_flight: Count = 64, faults: Number = 0.1, timeout: Number = 5.0, json: bool = False
) -> None:
    """Measure requests a second of the annotation client, against a server that fails on purpose.

        kangaroo bench annotate --requests=5000

    Args:
        requests: number of different requests, each asked twice
        in_flight: requests at a time
        faults: share of the calls that fail
        timeout: seconds after which a call fails
        json: print JSON
    """
    from kangaroo_jax.bench.annotate import bench_annotate

    _show(bench_annotate(requests, in_flight, faults, timeout), json)


def curate(*, input: str, rounds: Natural = 0, json: bool = False) -> None:
    """Measure CPU seconds of each stage of curation, and two workers against one.

        kangaroo bench curate --input=videos/ --rounds=1

    Args:
        input: folders, media files or manifests, comma-separated
        rounds: number of turns of one worker and two
        json: print JSON
    """
    from kangaroo_jax.bench.curate import bench_curate, table

    found = bench_curate(listed(input), rounds)
    if json:
        print(json_text.dumps(found))
        return
    print(table(found["cpu_seconds"]))
    for row in found["one_worker_and_two"]:
        print("two workers against one: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))


def chat(
    *,
    vs: str = "",
    preset: str = "base_100m",
    frames: str = "8,16,64,160",
    quantize: str | None = None,
    kv_dtype: str | None = None,
    batch: str = "1,8",
    prompt: str = "2048,8192",
    new: Count = 32,
    rounds: Count = 3,
    seconds: Count = 180,
    folder: str = "bench_videos",
    json: bool = False,
) -> None:
    """Measure answering about a video on this device, or with --vs the engine beside transformers' generate.

        kangaroo bench chat --preset=kangaroo_8b --quantize=int8 --frames=8,160
        kangaroo bench chat --vs=transformers --batch=1 --prompt=2048

    Weights are random. Alone, it tells for each number of frames the seconds of decoding, ViT and prompt, to the first
    token and for each further one, and what share that is of the bandwidth that a copy reaches. With --vs the two get
    the same weights and prompts, in turn.

    Args:
        vs: transformers
        preset: of the model
        frames: of the video, with commas
        quantize: int8 or int4, of the decoder's weights
        kv_dtype: int8, of what is remembered
        batch: with --vs: conversations at a time, with commas
        prompt: with --vs: tokens of each, three quarters of them vision tokens, with commas
        new: tokens of an answer
        rounds: how often all is measured, after once that compiles
        seconds: length of the video
        folder: for the video, which is made once
        json: print JSON
    """
    _begin()
    if not vs:
        _answering(preset, frames, quantize, kv_dtype, new, rounds, seconds, Path(folder), json)
        return
    if vs != "transformers":
        raise UserError(f"bench chat: --vs={vs}: there is only transformers to compare with")
    from kangaroo_jax.bench.chat import bench_chat

    sizes = [[int(n) for n in listed(text) if n.isascii() and n.isdigit() and int(n)] for text in (batch, prompt)]
    if not all(sizes) or [len(found) for found in sizes] != [text.count(",") + 1 for text in (batch, prompt)]:
        raise UserError("bench chat: --batch and --prompt must be numbers, such as 1,8")
    rows = bench_chat(preset, sizes[0], sizes[1], new, rounds, tell=silent if json else print)
    if json:
        print(json_text.dumps(rows))


def _answering(
    preset: str,
    frames: str,
    quantize: str | None,
    kv_dtype: str | None,
    new: int,
    rounds: int,
    seconds: int,
    folder: Path,
    json: bool,
) -> None:
    from kangaroo_jax.bench.answering import bench_answering, table
    from kangaroo_jax.inference.memories import check_kv_dtype
    from kangaroo_jax.models.quantized import FORMATS
    from kangaroo_jax.system.files import make_folder

    counts = [int(text) for text in listed(frames) if text.isascii() and text.isdigit() and int(text)]
    if not counts or len(counts) != frames.count(",") + 1:
        raise UserError(f"bench chat: --frames={frames}: must be numbers, such as 8,160")
    if quantize is not None and quantize not in FORMATS:
        raise UserError(f"bench chat: --quantize={quantize}: use one of {', '.join(FORMATS)}")
    check_kv_dtype(kv_dtype)
    found = bench_answering(
        preset,
        counts,
        quantize=quantize,
        kv_dtype=kv_dtype,
        new=max(new, 8),
        rounds=rounds,
        seconds=seconds,
        folder=make_folder(folder),
        tell=silent if json else print,
    )
    print(json_text.dumps(found) if json else table(found))


def quantize(
    *,
    checkpoint: str,
    data: str,
    quantize: str = "int8,int4",
    kv_dtype: str | None = None,
    dtype: str | None = None,
    questions: Natural = 0,
    json: bool = False,
) -> None:
    """Measure how far rounding moves a model's answers to held-out questions: divergence, and right answers.

        kangaroo bench quantize --checkpoint=runs/quickstart --data=runs/quickstart/corpus/eval_short.jsonl

    Args:
        checkpoint: what training wrote: a curriculum, a stage or one step
        data: annotation files whose conversations end with the true answer, comma-separated
        quantize: formats of the decoder's weights, comma-separated
        kv_dtype: int8, to measure rounded keys and values as well
        dtype: of the computation: float32, bfloat16 or float16; by default what suits the device
        questions: the first so many of each file; 0 is all
        json: print JSON
    """
    _begin()
    from kangaroo_jax.bench.quantize import bench_quantize, line

    rows = bench_quantize(
        checkpoint,
        listed(data),
        forms=listed(quantize),
        kv_dtype=kv_dtype,
        dtype=dtype,
        questions=questions,
        tell=silent if json else print,
    )
    print(json_text.dumps(rows) if json else "\n".join(map(line, rows)))


def serve(
    *,
    checkpoint: str = "",
    url: str = "",
    api_key: str = "",
    model: str = "kangaroo",
    clients: Count = 64,
    requests: Count = 500,
    rounds: Count = 3,
    tokens: Count = 16,
    max_body_mb: Count = 4,
    json: bool = False,
) -> None:
    """Measure a server under many clients: text, images and videos, streams, clients that leave, mistakes.

        kangaroo bench serve --checkpoint=runs/quickstart --clients=64

    Args:
        checkpoint: start a server of it, and compare its answers with those of the Python API
        url: a server that runs, http://HOST:PORT, in place of a checkpoint
        api_key: that server's
        model: its name in requests
        clients: requests at a time
        requests: in a round
        rounds: number of rounds
        tokens: of the longest answer
        max_body_mb: bound of the server's bodies, one of which is larger
        json: print JSON
    """
    from kangaroo_jax.bench.serve import bench_serve

    rows = bench_serve(
        checkpoint=checkpoint,
        url=url,
        key=api_key,
        model=model,
        clients=clients,
        requests=requests,
        rounds=rounds,
        tokens=tokens,
        body_mb=max_body_mb,
        tell=silent if json else print,
    )
    if json:
        print(json_text.dumps(rows))


def _begin() -> None:
    """Set up a process for measurements."""
    from kangaroo_jax.system.memory import keep_freed_memory

    keep_freed_memory()


def _show(result: Mapping[str, Any], json: bool) -> None:
    print(json_text.dumps(result) if json else "\n".join(f"{key:20} {value}" for key, value in result.items()))


COMMANDS = {
    "train": train,
    "vision": vision,
    "train-vs-torch": train_vs_torch,
    "data": data,
    "batches": batches,
    "packing": packing,
    "checkpoint": checkpoint,
    "convert": convert,
    "annotate": annotate,
    "curate": curate,
    "chat": chat,
    "quantize": quantize,
    "serve": serve,
}
