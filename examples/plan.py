"""What each stage of the 8B model needs on a slice of GPUs, by formula: memory, time, chip-hours.

    python examples/plan.py [--topology=H100:64] [--mfu=0.4]

For TPUs (`--topology=v5e:4x8`) each stage's step is compiled, a minute or two each; that needs the extra `tpu`.
"""

import argparse

from kangaroo_jax.chips import parse_topology
from kangaroo_jax.config import STAGES, StageConfig
from kangaroo_jax.planning.plan import make_plan


def main() -> None:
    """A line a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="H100:64")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the chips' peak that training is to reach")
    arguments = parser.parse_args()

    hours = 0.0
    for stage in STAGES:
        plan = make_plan(
            StageConfig.load(f"{stage}:kangaroo_8b"), parse_topology(arguments.topology), mfu=arguments.mfu
        )
        hours += plan.chip_hours
        memory = f"{plan.peak_hbm_gib:5.1f} of {plan.capacity_gib:.0f} GiB"
        print(f"{stage:22} {memory}  {'fits' if plan.fits else 'does not fit'}  {plan.step_seconds:6.1f} s a step")
    print(f"{hours:,.0f} chip-hours in all")


if __name__ == "__main__":
    main()
