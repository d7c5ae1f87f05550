"""Turn a checkpoint into a Hugging Face folder and back, and see that no bit has changed.

    python examples/convert.py [--checkpoint=runs/examples/train] [--to=runs/examples/convert]

The folder `hf` loads with transformers' AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True).
"""

import argparse
from pathlib import Path

import numpy as np

from kangaroo_jax import convert
from kangaroo_jax.checkpoints.reading import load_config, load_params
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.models.parameters import abstract_model


def main() -> None:
    """There and back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/examples/train"), help="what examples/train.py wrote"
    )
    parser.add_argument("--to", type=Path, default=Path("runs/examples/convert"), help="a new folder")
    arguments = parser.parse_args()

    exported = convert([arguments.checkpoint], arguments.to / "hf")
    back = convert([exported], arguments.to / "orbax")

    binding = abstract_model(ModelConfig.from_config(load_config(arguments.checkpoint).model))
    before, after = load_params(arguments.checkpoint, binding), load_params(back, binding)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(after[name]), err_msg=name)
    print(f"{len(before)} tensors are bit for bit what they were; {exported} has:")
    print(*sorted(f"  {path.name}" for path in exported.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
