"""Train the tiny model on a JSONL of your own (or on sixteen clips that this makes), from nothing, on a CPU.

    python examples/train.py [--data=FILE.jsonl] [--workdir=runs/examples] [--steps=150]

Run it again and it goes on after its last checkpoint. `examples/chat.py` asks what it has learnt.
"""

import argparse
from pathlib import Path

from clips import write_clips

from kangaroo_jax import load_config, train
from kangaroo_jax.data.annotations.sources import read_conversations
from kangaroo_jax.data.tokenizer import train_sentencepiece


def main() -> None:
    """Make the data if there is none, and a tokenizer of its words; train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="records in any format of docs/data.md; media beside it")
    parser.add_argument("--workdir", type=Path, default=Path("runs/examples"))
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()

    data = arguments.data or write_clips(arguments.workdir / "data")
    tokenizer = arguments.workdir / "tokenizer.model"
    if not tokenizer.exists():  # it belongs to the weights: a run that goes on keeps its own
        words = [turn.text for conversation in read_conversations([data]) for turn in conversation.turns]
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        train_sentencepiece(words, tokenizer, vocab_size=300)

    config = load_config("stage3_refine:tiny").unlock()
    config.data.update(train=(str(data),), tokenizer=str(tokenizer), packs_per_batch=1)
    config.train.update(steps=arguments.steps, log_every=25, checkpoint_every=50)
    result = train(config.lock(), arguments.workdir / "train")
    print(f"{result.steps} steps in {result.seconds:.0f} s, {result.useful_token_share:.0%} of the tokens useful")


if __name__ == "__main__":
    main()
