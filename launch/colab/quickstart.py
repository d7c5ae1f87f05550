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
# # The quickstart, stage by stage
#
# A tiny Kangaroo is trained from nothing on videos that are made here, through the warm-up and all five stages, and you see the
# losses fall while it happens. At the end it answers questions about videos that it has never seen.
#
# | | |
# |---|---|
# | accelerator | none; two CPU cores |
# | time | about a quarter of an hour for `SCALE = 1.0`; on two busy cores up to an hour |
# | disk | 0.2 GB |
# | after a disconnection | run all cells again with the same `WORK` on a drive: it goes on from the last checkpoint |

# %% tags=["parameters"]
import os
from pathlib import Path

SOURCE = ""  # address of the repository for `git clone`; nothing where kangaroo_jax is installed
DRIVE = Path("/content/drive/MyDrive")  # Google's, once it is mounted
TINY = os.environ.get("KANGAROO_TINY") == "1"  # a minute, to see that every cell runs; it learns nothing
SCALE = 0.004 if TINY else 1.0  # share of the corpus and of the steps
WORK = (DRIVE if DRIVE.exists() else Path("runs")) / "quickstart"

# %% [markdown]
# On Colab, mount the drive before the cell above: `from google.colab import drive; drive.mount("/content/drive")`.

# %%
import importlib.util
import subprocess

if importlib.util.find_spec("kangaroo_jax") is None:  # a fresh machine
    assert SOURCE, "say in SOURCE where the repository is"
    install = f"test -d kangaroo_jax || git clone --depth=1 {SOURCE} kangaroo_jax; kangaroo_jax/launch/colab/install.sh"
    subprocess.run(["bash", "-c", f"{install} quickstart,curation"], check=True)
    print("installed: restart the runtime, and run the cells again")

# %%
# !kangaroo info
assert _exit_code == 0

# %% [markdown]
# ## Train
#
# The training is a process of its own and writes to `quickstart.log`. Interrupt the cell that watches it as you like: the
# training goes on.

# %%
WORK.mkdir(parents=True, exist_ok=True)
log = WORK / "quickstart.log"
with open(log, "a") as file:
    command = ["kangaroo", "quickstart", f"--workdir={WORK}", f"--scale={SCALE}"]
    training = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

# %%
import json
import time

import matplotlib.pyplot as plt
from IPython.display import clear_output


def losses() -> dict[str, tuple[list[int], list[float]]]:
    """Steps and losses of every stage that has begun."""
    found = {}
    for path in sorted(WORK.glob("stage*/metrics.jsonl")):
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        lines = [line for line in map(json.loads, whole) if "loss" in line]
        found[path.parent.name] = ([line["step"] for line in lines], [line["loss"] for line in lines])
    return found


def draw() -> None:
    """A picture of the losses so far, and the last lines of the log."""
    stages = losses()
    if stages:
        _, axes = plt.subplots(1, len(stages), figsize=(3 * len(stages), 2.5), squeeze=False)
        for axis, (name, (steps, values)) in zip(axes[0], stages.items(), strict=True):
            axis.plot(steps, values)
            axis.set_title(name.replace("_", " "), fontsize=8)
        plt.tight_layout()
        plt.show()
    print("\n".join(log.read_text().splitlines()[-6:]))


while training.poll() is None:
    clear_output(wait=True)
    draw()
    time.sleep(10)
clear_output(wait=True)
draw()
assert training.returncode == 0, f"it ended early; {log} says why"

# %% [markdown]
# ## What each stage learnt
#
# Multiple choice among four, on files of which it has seen none. Chance is 25%.

# %%
results = json.loads((WORK / "results.json").read_text())
for stage in results["stages"]:
    print(f"{stage['name']:24} short clips {stage['short_mcq']:4.0%}   long videos {stage['long_mcq']:4.0%}")

# %% [markdown]
# What the third stage was given first: packed rows, frames with their seconds, the text with the trained tokens marked.

# %%
from IPython.display import Image, display

display(Image(str(WORK / "stage3_refine" / "first_batch.png"), width=720))

# %% [markdown]
# ## Ask it
#
# A clip of its world that was never drawn before. The second question needs no second look.

# %%
from IPython.display import Video

from kangaroo_jax import Kangaroo
from kangaroo_jax.web.examples import make_clip

clip = WORK / "order.mp4"
make_clip("order", seed=int(time.time()), path=clip)
display(Video(str(clip), embed=True, width=240))
with Kangaroo.load(WORK) as model:
    answer, history = model.chat(video=clip, query="What comes first?")
    print("What comes first?", answer)
    answer, history = model.chat(query="How long is the video?", history=history)
    print("How long is the video?", answer)

# %% [markdown]
# `report.html` in `WORK` has all of it on one page. Next: [teach it clips of your own](finetune.ipynb).
