"""One process of several that train together: `processes.py CORPUS WORKDIR STEPS CHECKPOINT_EVERY [QUIZ [CONTEXT]]`.

With QUIZ, a file of questions, the stage is measured every four steps. With CONTEXT every row is cut over so many
processes, and a line at the end says how many frames were decoded here.
"""

import os
import sys
from pathlib import Path


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
    if len(sys.argv) > 6:
        config.train.mesh = (1, 1, int(sys.argv[6]), 1)
        config.eval.update(every=4, held_out=(str(corpus / "stage2.jsonl"),))
    elif len(sys.argv) > 5:
        config.train.lost_seconds = 60.0  # two engines compile at once
        config.eval.update(every=4, held_out=(str(corpus / "stage2.jsonl"),), benchmarks=(sys.argv[5],), best="loss")
    decoded = []
    submit = ThreadDecoder.submit
    ThreadDecoder.submit = lambda self, ref, side: decoded.append(ref.wanted) or submit(self, ref, side)
    train(config, workdir, evaluator=evaluator, tell=lambda line: print(line, flush=True))
    print(f"decoded {sum(decoded)} frames")


if __name__ == "__main__":
    main()
