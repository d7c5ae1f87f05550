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
# # LoRA on your own clips
#
# A model learns an answer about your clips that it did not know, and keeps what it knew. A fifth of the clips is held out and
# measured on the way. The result is an adapter, and an export that PyTorch runs without this package.
#
# | | |
# |---|---|
# | accelerator | for a quickstart's model none; for 8B `kangaroo plan` says which: [fine-tuning](../../docs/finetune.md) |
# | time | a quickstart's model and 120 clips: 140 s of two CPU cores, and a minute for the export |
# | disk | 0.1 GB beside the base |
# | after a disconnection | run all cells again with the same `WORK` on a drive: it goes on from the last checkpoint |

# %% tags=["parameters"]
import os
from pathlib import Path

SOURCE = ""  # address of the repository for `git clone`; nothing where kangaroo_jax is installed
DRIVE = Path("/content/drive/MyDrive")  # Google's, once it is mounted
PLACE = DRIVE if DRIVE.exists() else Path("runs")
BASE = os.environ.get("KANGAROO_MODEL", str(PLACE / "quickstart"))  # the quickstart's notebook makes one
DATA = ""  # your table with the columns video, question, answer, or a folder of labels; without it clips are drawn
TINY = os.environ.get("KANGAROO_TINY") == "1"  # a minute, to see that every cell runs; it learns nothing
WORK = PLACE / "finetune"

# %% [markdown]
# On Colab, mount the drive before the cell above: `from google.colab import drive; drive.mount("/content/drive")`.

# %%
import importlib.util
import subprocess

if importlib.util.find_spec("kangaroo_jax") is None:  # a fresh machine
    assert SOURCE, "say in SOURCE where the repository is"
    install = f"test -d kangaroo_jax || git clone --depth=1 {SOURCE} kangaroo_jax; kangaroo_jax/launch/colab/install.sh"
    subprocess.run(["bash", "-c", f"{install} quickstart,convert"], check=True)
    print("installed: restart the runtime, and run the cells again")

# %% [markdown]
# ## The clips
#
# Without `DATA`: in half of the clips a thing moves, in the others it stands still. The answer to "Does it move or stay?" is "one"
# or "two", which nothing but your clips says. Of your own, `kangaroo data init mine.csv` writes a table to fill in.

# %%
import csv

from kangaroo_jax.corpus.draw import write_video
from kangaroo_jax.web.examples import make_scene

WORK.mkdir(parents=True, exist_ok=True)
data = Path(DATA) if DATA else WORK / "clips.csv"
if not data.exists():
    rows = []
    for i in range(10 if TINY else 120):
        kind = ("move", "still")[i % 2]
        write_video(make_scene(kind, seed=i), WORK / f"{kind}{i}.mp4", fps=4)
        rows.append((f"{kind}{i}.mp4", "Does it move or stay?", ("one", "two")[i % 2]))
    with open(data, "w", newline="") as file:
        csv.writer(file).writerows([("video", "question", "answer"), *rows])
print(data.read_text()[:200] if data.is_file() else sorted(data.iterdir())[:5])

# %% [markdown]
# ## What it will need
#
# Nothing is trained yet: memory and disk by formula, minutes by a step on this device, warnings about the data, and the first batch.

# %%
RUN = WORK / "run"
# !kangaroo finetune --base={BASE} --data={data} --workdir={RUN} --dry-run
assert _exit_code == 0

# %%
from IPython.display import HTML, Image, display

display(Image(str(RUN / "first_batch.png"), width=720))

# %% [markdown]
# ## Train
#
# Half of the samples are replayed from the base's own data where it is still there, or from `--replay=FILE`. For a large decoder on a
# small chip add `--quantize=int8`.

# %%
SHORT = "--config.train.steps=4 --config.eval.every=2" if TINY else ""
# !kangaroo finetune --base={BASE} --data={data} --workdir={RUN} {SHORT}
assert _exit_code == 0

# %% [markdown]
# ## The held-out curve

# %%
display(Image(str(RUN / "curves.png"), width=560))

# %%
import json

results = json.loads((RUN / "held_out" / "results.json").read_text())
print({key: value for key, value in results.items() if isinstance(value, int | float)})
display(HTML((RUN / "held_out" / "report.html").read_text()))

# %% [markdown]
# ## Ask it

# %%
from kangaroo_jax import Kangaroo

write_video(make_scene("move", seed=1000), WORK / "new.mp4", fps=4)
question = "Does it move or stay?"
with Kangaroo.load(RUN) as model:
    answer, _ = model.chat(video=WORK / "new.mp4", query=question, max_new_tokens=16)
print(question, answer)

# %% [markdown]
# ## Export to PyTorch
#
# The adapter is added to the weights. The folder needs torch and transformers, and nothing of this package.

# %%
EXPORT = WORK / "export"
# !test -e {EXPORT} || kangaroo convert --from={RUN} --to={EXPORT}
assert _exit_code == 0
print(*sorted(path.name for path in EXPORT.iterdir()), sep="\n")

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

theirs = AutoModelForCausalLM.from_pretrained(EXPORT, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(EXPORT, trust_remote_code=True)
asked = {"video_path": str(WORK / "new.mp4"), "query": question, "tokenizer": tokenizer, "history": None}
again, _ = theirs.chat(**asked, max_new_tokens=16, do_sample=False)  # by default it draws, as the released model does
print(question, again)
assert again.strip() == answer
