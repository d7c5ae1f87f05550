"""One process of several that train together.

`processes.py CORPUS WORKDIR STEPS CHECKPOINT_EVERY [QUIZ [CONTEXT [SPIKE]]]`

With QUIZ, a file of questions, the stage is measured every four steps. With CONTEXT every row is cut over so many
processes, and a line at the end says how many frames were decoded here. With SPIKE the last
two of four rows of that step have a gradient of many times the usual, spikes are passed over, and a line at each save
has a digest of the weights and moments that this host holds.
"""

import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    corpus, workdir, steps, every = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    os.environ["JAX_PLATFORMS"] = "cpu"

    from kangaroo_jax.cli.evaluator import evaluator
    from kangaroo_jax.training.distributed import initialize

    initialize(timeout=120)

    from kangaroo_jax.data.media.decode import ThreadDecoder
    from kangaroo_jax.training import curriculum
    from kangaroo_jax.training.loop import train

    tokenizer = corpus / "tokenizer.model"
    config = curriculum.stage("stage4_instruct", "tiny", data=corpus, tokenizer=tokenizer, init_from="")
    config.data.update(packs_per_batch=4, tokens_per_pack=256, frames_per_pack=16, packing_bins=2)
    config.train.update(steps=steps, checkpoint_every=every, log_every=1, lost_seconds=8.0)
    config.model.vision.depth = config.model.llm.depth = 1
    quiz, context, spike = (*sys.argv[5:], "", "", "")[:3]
    if spike:
        config.optimizer.update(spike_factor=5.0, spike_window=10)
        with_spike(config, int(spike))
    elif context:
        config.train.mesh = (1, 1, int(context), 1)
        config.eval.update(every=4, held_out=(str(corpus / "stage2.jsonl"),))
    elif quiz:
        config.train.lost_seconds = 60.0  # two engines compile at once
        config.eval.update(every=4, held_out=(str(corpus / "stage2.jsonl"),), benchmarks=(quiz,), best="loss")
    decoded = []
    submit = ThreadDecoder.submit
    ThreadDecoder.submit = lambda self, ref, side: decoded.append(ref.wanted) or submit(self, ref, side)
    train(config, workdir, evaluator=evaluator, tell=lambda line: print(line, flush=True))
    print(f"decoded {sum(decoded)} frames")


def with_spike(config: Any, spike: int) -> None:
    """Spoil the last two of four rows in step `spike`, and have every save print what this host holds."""
    import jax

    from kangaroo_jax.training.checkpoint import Checkpoints
    from kangaroo_jax.training.host_rows import HostRows

    config.train.mesh = (jax.process_count(), 1, 1, 1)  # every host has all weights
    put, save, steps = HostRows.put, Checkpoints.save, itertools.count(1)

    def spoilt(self: HostRows, batch: Any) -> Any:
        if next(steps) != spike:
            return put(self, batch)
        weights = np.array(batch.weights)
        for row, number in enumerate(self.numbers):
            (trained,) = np.nonzero(weights[row])
            pairs = trained[: len(trained) // 2 * 2] if number >= 2 else trained[:0]
            weights[row, pairs[0::2]] += 1000  # their sum, by which the loss is divided, stays as it was
            weights[row, pairs[1::2]] -= 1000
        print(f"spoilt rows {[number for number in self.numbers if number >= 2]}", flush=True)
        return put(self, batch.replace(weights=weights))

    def look(self: Checkpoints, state: Any, *rest: Any) -> None:
        digest = hashlib.sha256()
        for array in jax.tree.leaves((state.params, state.opt_state.inner)):
            digest.update(np.asarray(array.addressable_data(0)).tobytes())
        print(f"holds {int(state.step)} {digest.hexdigest()} spikes {int(state.opt_state.spikes)}", flush=True)
        save(self, state, *rest)

    HostRows.put, Checkpoints.save = spoilt, look


if __name__ == "__main__":
    main()
