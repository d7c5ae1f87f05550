# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A stage planned for a pod
#
# What the last stage of an 8B Kangaroo needs on chips that you have not rented: memory, hours and cost. The real training step is
# compiled for them here, without a chip. Then the commands that would start it.
#
# | | |
# |---|---|
# | accelerator | none |
# | time | 3 to 20 minutes of two CPU cores for each TPU slice that is compiled; seconds by formula |
# | disk | 2 GB, nearly all of it libtpu |
# | after a disconnection | run all cells again: with `WORK` on a drive, `--cache` has what was compiled |

# %% tags=["parameters"]
import os
from pathlib import Path

SOURCE = ""  # address of the repository for `git clone`; nothing where kangaroo_jax is installed
DRIVE = Path("/content/drive/MyDrive")  # Google's, once it is mounted
TINY = os.environ.get("KANGAROO_TINY") == "1"  # to see that every cell runs, by formula
CONFIG = "stage5_long_video:kangaroo_8b"
TOPOLOGIES = ["H100:32", "H100:64"] if TINY else ["v5e:4x8", "v6e:4x8", "H100:64"]
PRICE = 1.2  # of a chip and hour, in your currency
WORK = (DRIVE if DRIVE.exists() else Path("runs")) / "plan"

# %% [markdown]
# On Colab, mount the drive before the cell above: `from google.colab import drive; drive.mount("/content/drive")`.

# %%
import importlib.util
import subprocess

if importlib.util.find_spec("kangaroo_jax") is None:  # a fresh machine
    assert SOURCE, "say in SOURCE where the repository is"
    install = f"test -d kangaroo_jax || git clone --depth=1 {SOURCE} kangaroo_jax; kangaroo_jax/launch/colab/install.sh"
    subprocess.run(["bash", "-c", f"{install} quickstart,tpu"], check=True)
    print("installed: restart the runtime, and run the cells again")

# %% [markdown]
# ## All five stages, by formula
#
# Seconds, and a first idea of the whole.

# %%
# !kangaroo plan --curriculum --topology={TOPOLOGIES[-1]} --price-per-chip-hour={PRICE}
assert _exit_code in (0, 3)  # 3: a stage does not fit, and the nearest change that does is named

# %% [markdown]
# ## One stage on several slices
#
# Compiled for TPUs, by formula for GPUs where their compiler is not installed.

# %%
WORK.mkdir(parents=True, exist_ok=True)
TABLE = WORK / "plans.jsonl"
TABLE.unlink(missing_ok=True)
for topology in TOPOLOGIES:
    # !kangaroo plan --config={CONFIG} --topology={topology} --price-per-chip-hour={PRICE} --cache={WORK} --json >> {TABLE}
    assert _exit_code in (0, 3)

# %%
# !kangaroo plan --table={TABLE}
assert _exit_code == 0

# %% [markdown]
# ## The cheapest that fits

# %%
import json

plans = [json.loads(line) for line in TABLE.read_text().splitlines()]
fitting = [plan for plan in plans if plan["fits"]]
assert fitting, "nothing fits: take a larger slice"
best = min(fitting, key=lambda plan: plan["cost"])
print(f"{best['topology']}: {best['chip_hours']:,.0f} chip-hours, {best['cost']:,.0f} at {PRICE} an hour")

# %% [markdown]
# ## What would start it
#
# A dry run prints every command and runs none. [Cloud TPUs](../../docs/launch/tpu.md), [GKE](../../docs/launch/gke.md),
# [Slurm](../../docs/launch/slurm.md) have the rest: storage, restarts, what is lost when a host goes.

# %%
import kangaroo_jax

CLONE = Path(kangaroo_jax.__file__).parents[1]
TRAIN = f"train --config={CONFIG} --workdir=/data/stage5 --config.init_from=/data/stage4"
# !{CLONE}/launch/slurm/train.sh --dry-run --nodes=8 --gpus-per-node=8 -- {TRAIN}
assert _exit_code == 0
