"""`kangaroo bench batches`: how fast this machine makes a stage's batches of one's own data, as training would."""

import statistics
import time
from typing import Any

from kangaroo_jax.config import StageConfig
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.system.cpus import usable_cpus
from kangaroo_jax.system.progress import Tell
from kangaroo_jax.training.loop import open_loader, open_tokenizer


def bench_batches(config: StageConfig, batches: int, tell: Tell = print) -> dict[str, Any]:
    """Make `batches` batches one after the other, with nothing between them; a first one, not counted, fills the queue.

    Returns first_seconds, seconds_a_batch (the median), frames_a_second and frames_a_cpu (a second of a CPU, `kangaroo
    plan --frames-a-cpu`; not where worker processes decode), cpus_busy and cpus, the shares useful_tokens and
    useful_frames, and samples_skipped. Raises UserError.
    """
    tokenizer = open_tokenizer(config)
    loader = open_loader(config, tokenizer, Ledger(), range(config.data.packs_per_batch))
    for line in loader.describe():
        tell(line)
    seconds, found = [], []
    started = time.perf_counter()
    next(loader)
    first = time.perf_counter() - started
    cpu = time.process_time()
    for number in range(1, batches + 1):
        began = time.perf_counter()
        found.append(next(loader)[1])
        seconds.append(time.perf_counter() - began)
        tell(f"{number}/{batches}  {seconds[-1]:.2f} s, {found[-1].frames:,} frames, {found[-1].tokens:,} tokens")
    cpu, whole, frames = time.process_time() - cpu, sum(seconds), sum(batch.frames for batch in found)
    threads = not config.data.num_workers  # which are of this process
    return {
        "first_seconds": round(first, 2),
        "seconds_a_batch": round(statistics.median(seconds), 3),
        "frames_a_second": round(frames / whole, 1),
        **({"frames_a_cpu": round(frames / cpu, 1), "cpus_busy": round(cpu / whole, 2)} if threads else {}),
        "cpus": usable_cpus(),
        "useful_tokens": round(sum(x.tokens for x in found) / sum(x.token_capacity for x in found), 4),
        "useful_frames": round(frames / max(1, sum(x.frame_capacity for x in found)), 4),
        "samples_skipped": found[-1].skipped,
    }
