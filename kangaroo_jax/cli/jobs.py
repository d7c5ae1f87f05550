"""The jobs of the command line, each a module of this package that is imported on demand.

The module's `COMMANDS` maps names to typed functions. "" is the job itself, the others are jobs within it.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Job:
    """A line of the table."""

    summary: str
    huge_pages: bool = False  # for jobs that run a model in this process


JOBS = {
    "quickstart": Job("train a small Kangaroo: a tiny one from nothing, in minutes on a CPU", huge_pages=True),
    "curriculum": Job("train all five stages, each from the last one's weights", huge_pages=True),
    "train": Job("train one stage from a config file; --config.KEY=VALUE changes it", huge_pages=True),
    "finetune": Job("teach a model your own videos: a table, a folder of labels, or JSON", huge_pages=True),
    "chat": Job("ask a trained model about a video or an image", huge_pages=True),
    "serve": Job("answer requests of OpenAI's protocol about videos", huge_pages=True),
    "web": Job("show a page on which films are uploaded and talked about", huge_pages=True),
    "eval": Job("answer published benchmarks from local files, and score the answers", huge_pages=True),
    "convert": Job("convert weights from and to Hugging Face, PyTorch and Meta"),
    "info": Job("print the versions and the machine"),
    "doctor": Job("test what is installed, and say what each extra would add"),
    "plan": Job("what a stage needs on chips not rented yet: memory, time, cost"),
    "data": Job("check, measure, build and look at training data"),
    "curate": Job("score raw videos and images and choose among them"),
    "annotate": Job("caption clips by their key frames, with any models"),
    "instruct": Job("make an instruction set from captions"),
    "bench": Job("measure training, the data loader, packing, conversion, curation and annotation", huge_pages=True),
}


def commands_of(job: str) -> Mapping[str, Callable[..., None]]:
    """The commands of a job."""
    commands: Mapping[str, Callable[..., None]] = importlib.import_module(f"{__package__}.{job}").COMMANDS
    return commands
