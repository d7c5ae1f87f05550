"""`kangaroo plan --mode=kernels`: makes lines of `kernels.jsonl`, by compiling the attention kernels alone.

libtpu writes schedules only where its flags say so when it starts, hence a process for each kernel; it writes those of
everything, half a GB, which is thrown away when the kernel's own are read.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kangaroo_jax.chips import parse_topology
from kangaroo_jax.errors import UserError
from kangaroo_jax.planning import bundles, hlo, kernels
from kangaroo_jax.planning.kernels import Shape, Timed
from kangaroo_jax.system.progress import Tell

# (tokens, width of a head, causal, fused backward): the decoder's blocks of 512 and of 1,024, and the ViT's kernels.
CASES = ((4096, 128, True, True), (16384, 128, True, True), (1025, 64, False, True), (4096, 128, True, False))
HEADS, KV_HEADS = 4, 2
FRAMES = 64


def run_kernels(topology: str, tell: Tell = print) -> None:
    """Print a line for every kernel on the chip of `topology`. Raises UserError."""
    target = parse_topology(topology)
    if target.chip.name not in kernels.CLOCK_GHZ:
        raise UserError(
            f"--mode=kernels: schedules are read for {', '.join(kernels.CLOCK_GHZ)}, not {target.chip.name}"
        )
    for tokens, width, causal, fused in CASES:
        for line in _lines(topology, tokens, width, causal, fused):
            tell(line)


def _lines(topology: str, tokens: int, width: int, causal: bool, fused: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {bundles.DUMP_FLAGS.format(folder=folder)}"
        words = [str(tokens), str(width), *(["--causal"] if causal else []), *(["--fused"] if fused else [])]
        done = subprocess.run(
            [sys.executable, "-m", __name__, topology, *words, f"--folder={folder}"],
            env={**os.environ, "LIBTPU_INIT_ARGS": flags},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"a kernel was not compiled: {' '.join(done.stderr.split())[-400:]}")
    return done.stdout.splitlines()


def _read(folder: Path, program: str, chip: str) -> list[str]:
    """Lines of the kernels of a compiled program, whose schedules are in `folder`."""
    from importlib import metadata

    made: dict[Shape, Timed] = {}
    for visit in hlo.walk(program):
        call = kernels.call(visit)
        if call is None:
            continue
        name = "dkv" if call.kind == "fused" else call.kind
        files = [file for file in sorted(folder.glob(bundles.FILES)) if f"_{name}_" in file.name]
        schedule = bundles.read(files[0].read_text(encoding="utf-8"))
        steps = call.items * (call.length // call.blocks[0]) * (call.keys // call.blocks[1])
        cores = max(1, round(steps / schedule.trips))
        made[call.shape(chip)] = Timed(schedule, cores, metadata.version("jax"), metadata.version("libtpu"))
    return [timed.line(shape) for shape, timed in made.items()]


def _compile(arguments: argparse.Namespace) -> str:
    """Forward and backward of attention on one chip, as text."""
    from kangaroo_jax.planning.compile import prepare_environment, topology_devices

    prepare_environment()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from kangaroo_jax.models import attention_frames, attention_splash
    from kangaroo_jax.sharding import make_mesh

    if not arguments.fused:
        attention_splash.FUSED_SHARE = 0.0
    mesh = make_mesh((1, 1, 1, 1), topology_devices(parse_topology(arguments.topology))[:1])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tokens, width, causal = arguments.tokens, arguments.width, arguments.causal

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    taken: tuple[jax.ShapeDtypeStruct, ...]
    if causal:
        key = array(1, tokens, KV_HEADS, width)
        taken, ids = (array(1, tokens, HEADS, width), key, key), array(1, tokens, dtype=jnp.int32)
        made = taken[0]
    else:
        padded = -(-tokens // attention_frames.LANES) * attention_frames.LANES
        pairs = HEADS // attention_frames.HEADS
        taken, ids = (array(FRAMES, padded, pairs * attention_frames.TAKEN),), None
        made = array(FRAMES, padded, pairs * attention_frames.LANES)
        table = np.zeros((padded, width // 2), np.float32)

    def loss(taken: Any, weights: Any, ids: Any) -> Any:
        if causal:
            query, key, value = taken
            found = attention_splash.splash(query, key, value, (ids, ids), causal=True)
        else:
            found = attention_frames.frames(taken[0], table, table, tokens)
        return jnp.sum(found.astype(jnp.float32) * weights)

    step = jax.jit(jax.value_and_grad(loss))
    with jax.set_mesh(mesh):
        text: str = step.trace(taken, made, ids).lower(lowering_platforms=("tpu",)).compile().as_text()
    return text


def main() -> None:
    """The process that compiles one case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("topology")
    parser.add_argument("tokens", type=int)
    parser.add_argument("width", type=int)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    chip = parse_topology(arguments.topology).chip.name
    print("\n".join(_read(arguments.folder, _compile(arguments), chip)))


if __name__ == "__main__":
    main()
