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
# # Chat with a video, in int8 on one chip
#
# The weights of an 8B Kangaroo are rounded to int8 once, and then answer questions about a video. The video is watched for the
# first question; the second is answered at once.
#
# | | |
# |---|---|
# | accelerator | one v5e (13.2 of 15.8 GiB with 160 frames), L4 or A100, planned with `kangaroo plan --mode=chat`; a T4 by formula |
# | time | to fetch 17 GB; then minutes to round, seconds to answer (foretold 3.0 s for 160 frames on a v5e); **not yet run on a chip** |
# | disk | 17 GB for what is fetched, 9 GB for the int8 weights |
# | after a disconnection | run all cells again: with `WORK` on a drive the rounded weights are there and nothing is fetched |
#
# Any other model takes the same cells: a folder of this package, such as a quickstart's.

# %% tags=["parameters"]
import os
from pathlib import Path

SOURCE = ""  # address of the repository for `git clone`; nothing where kangaroo_jax is installed
DRIVE = Path("/content/drive/MyDrive")  # Google's, once it is mounted
MODEL = os.environ.get("KANGAROO_MODEL", "KangarooGroup/kangaroo")  # of Hugging Face's hub, or a folder
VIDEO = ""  # your file; without one a clip is drawn
QUESTIONS = ("What comes first?", "How long is the video?")
WORK = (DRIVE if DRIVE.exists() else Path("runs")) / "chat"

# %% [markdown]
# On Colab, mount the drive before the cell above: `from google.colab import drive; drive.mount("/content/drive")`.

# %%
import importlib.util
import subprocess

if importlib.util.find_spec("kangaroo_jax") is None:  # a fresh machine
    assert SOURCE, "say in SOURCE where the repository is"
    install = f"test -d kangaroo_jax || git clone --depth=1 {SOURCE} kangaroo_jax; kangaroo_jax/launch/colab/install.sh"
    subprocess.run(["bash", "-c", f"{install} quickstart,hub"], check=True)
    print("installed: restart the runtime, and run the cells again")

# %%
# !kangaroo info
assert _exit_code == 0

# %% [markdown]
# ## The weights, rounded once
#
# From the hub they are converted first, a tensor at a time: no more than 2 GiB of memory. What is whole is not made again.

# %%
WORK.mkdir(parents=True, exist_ok=True)
ROUNDED = WORK / "int8"
# !test -e {ROUNDED} || kangaroo convert --from={MODEL} --to={ROUNDED} --quantize=int8
assert _exit_code == 0

# %% [markdown]
# ## The video

# %%
import time

from IPython.display import Video, display

from kangaroo_jax.web.examples import make_clip

video = Path(VIDEO) if VIDEO else WORK / "order.mp4"
if not VIDEO:
    make_clip("order", seed=int(time.time()), path=video)
display(Video(str(video), embed=True, width=320))

# %% [markdown]
# ## Two rounds
#
# Everything is compiled before the first question. Keys and values are kept in int8 as well.

# %%
from kangaroo_jax import Kangaroo

model = Kangaroo.load(ROUNDED, kv_dtype="int8")
model.warm_up()

# %%
start = time.perf_counter()
first, history = model.chat(video=video, query=QUESTIONS[0])
print(f"{QUESTIONS[0]} {first}   ({time.perf_counter() - start:.2f} s)")

# %%
start = time.perf_counter()
second, history = model.chat(query=QUESTIONS[1], history=history)
print(f"{QUESTIONS[1]} {second}   ({time.perf_counter() - start:.2f} s)")
print(f"read again: {second.usage.prompt_tokens - second.usage.cached_tokens} of {second.usage.prompt_tokens} tokens")
assert second.usage.cached_tokens > first.usage.prompt_tokens // 2, "the video was read again"

# %% [markdown]
# An answer can be read while it is made:

# %%
for piece in model.chat(query="Describe the video.", history=history, stream=True, max_new_tokens=64):
    print(piece, end="", flush=True)

# %%
model.close()

# %% [markdown]
# The same in a terminal is `kangaroo chat --checkpoint=DIR --video=FILE`, in a browser `kangaroo web --checkpoint=DIR`, for clients of
# OpenAI's protocol `kangaroo serve --checkpoint=DIR`.
