"""The benchmarks by name."""

import dataclasses
from pathlib import Path

from kangaroo_jax.config_files import nearest
from kangaroo_jax.errors import UserError
from kangaroo_jax.evaluation.benchmarks import quickstart
from kangaroo_jax.evaluation.benchmarks.egoschema import EGOSCHEMA, EGOSCHEMA_SUBSET
from kangaroo_jax.evaluation.benchmarks.longvideobench import LONGVIDEOBENCH, LONGVIDEOBENCH_TEST
from kangaroo_jax.evaluation.benchmarks.lvbench import LVBENCH
from kangaroo_jax.evaluation.benchmarks.mlvu import MLVU, MLVU_TEST
from kangaroo_jax.evaluation.benchmarks.mmbench_video import MMBENCH_VIDEO
from kangaroo_jax.evaluation.benchmarks.mvbench import MVBENCH
from kangaroo_jax.evaluation.benchmarks.needle import NEEDLE, NEEDLE_TIME
from kangaroo_jax.evaluation.benchmarks.question import Benchmark
from kangaroo_jax.evaluation.benchmarks.seed_bench import SEED_BENCH_1, SEED_BENCH_2
from kangaroo_jax.evaluation.benchmarks.tempcompass import TEMPCOMPASS
from kangaroo_jax.evaluation.benchmarks.video_mme import VIDEO_MME, VIDEO_MME_SUBTITLES
from kangaroo_jax.evaluation.benchmarks.videovista import CULTURALLINGO, VIDEOVISTA
from kangaroo_jax.evaluation.benchmarks.vnbench import VNBENCH

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        *(MVBENCH, VIDEO_MME, VIDEO_MME_SUBTITLES, MLVU, MLVU_TEST, LVBENCH, VIDEOVISTA, SEED_BENCH_2, SEED_BENCH_1),
        *(EGOSCHEMA, EGOSCHEMA_SUBSET, LONGVIDEOBENCH, LONGVIDEOBENCH_TEST, TEMPCOMPASS, MMBENCH_VIDEO, CULTURALLINGO),
        *(VNBENCH, NEEDLE, NEEDLE_TIME, quickstart.QUICKSTART),
    )
}


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of a name, or the one that a file of JSON lines is; its media are in `--data`, or beside the file.

    Raises UserError.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name.endswith(".jsonl"):
        path = Path(name)
        return dataclasses.replace(
            quickstart.QUICKSTART,
            name=path.stem,
            title=path.stem,
            read=lambda folder: quickstart.read_file(path, folder),
            note="",
        )
    known = ", ".join(BENCHMARKS)
    raise UserError(f"no benchmark {name!r}{nearest(name, BENCHMARKS)}; there are {known}, or give a file FILE.jsonl")
