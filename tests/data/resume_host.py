"""One host of a run, for tests that kill it: `python -m tests.data.resume_host WORKDIR HOST HOSTS BATCHES WORKERS`.

WORKDIR has config.json ({"data": ..., "seed"}), tokenizer.model, and state.json where there is one to go on from.
Appends a line "BATCH ROW DIGEST" for each row of each batch to rows-HOST.txt, then keeps the state after that
batch as states/BATCH-HOST.json.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from kangaroo_jax.config import DataConfig, stage_config
from kangaroo_jax.conventions import FIELDS
from kangaroo_jax.data.batches.ledger import Ledger
from kangaroo_jax.data.batches.loader import Loader, make_loader
from kangaroo_jax.data.tokenizer import load_tokenizer


def open_loader(workdir: Path, host: int, hosts: int, workers: int) -> Loader:
    """The loader of `config.json`."""
    settings = json.loads((workdir / "config.json").read_text())
    config = DataConfig.from_config(stage_config("tiny").data.to_dict() | settings["data"] | {"num_workers": workers})
    return make_loader(
        config, load_tokenizer(workdir / "tokenizer.model"), frames_per_group=2, tokens_per_group=3,
        seed=settings["seed"], ledger=Ledger(workdir / f"ledger-{host}.jsonl"),
        rows=range(host * config.packs_per_batch // hosts, (host + 1) * config.packs_per_batch // hosts),
    )  # fmt: skip


def main() -> None:
    """See above."""
    workdir, (host, hosts, batches, workers) = Path(sys.argv[1]), map(int, sys.argv[2:6])
    start = time.perf_counter()
    loader = open_loader(workdir, host, hosts, workers)
    first, state = 0, workdir / "state.json"
    if state.exists():
        saved = json.loads(state.read_text())
        first = saved["batch"]
        loader.set_state(saved["state"].encode())
    print(f"opened {time.perf_counter() - start:.3f}", flush=True)
    with (workdir / f"rows-{host}.txt").open("a") as file:
        for batch in range(first, batches):
            start = time.perf_counter()
            arrays, stats = next(loader)
            if batch == first:
                print(f"first {time.perf_counter() - start:.3f}", flush=True)
            rows = len(arrays.tokens)
            for row in range(rows):
                digest = hashlib.sha256(b"".join(getattr(arrays, name)[row].tobytes() for name in FIELDS)).hexdigest()
                file.write(f"{batch} {host * rows + row} {digest[:24]} {stats.skipped if hosts == 1 else ''}\n")
            file.flush()
            place = workdir / "states" / f"{batch + 1}-{host}.json"
            temporary = place.with_suffix(".tmp")
            temporary.write_bytes(loader.get_state())
            temporary.replace(place)
    loader.close()


if __name__ == "__main__":
    main()
