"""Ask a trained model about a video, in two rounds: the second needs no video again.

    python examples/chat.py [--checkpoint=runs/examples/train] [--video=runs/examples/data/blue_left.mp4]

`examples/train.py` makes both.
"""

import argparse
from pathlib import Path

from kangaroo_jax import Kangaroo


def main() -> None:
    """Ask twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/examples/train"), help="what examples/train.py wrote"
    )
    parser.add_argument("--video", type=Path, default=Path("runs/examples/data/blue_left.mp4"))
    arguments = parser.parse_args()

    model = Kangaroo.load(arguments.checkpoint)
    answer, history = model.chat(video=arguments.video, query="What colour is it?", max_new_tokens=16)
    print(f"What colour is it?       {answer}")
    answer, history = model.chat(query="Which way does it move?", history=history, max_new_tokens=16)
    print(f"Which way does it move?  {answer}")


if __name__ == "__main__":
    main()
