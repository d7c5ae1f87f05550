"""Repositories of Hugging Face's hub by name, OWNER/NAME or OWNER/NAME@REVISION, wherever a folder is taken."""

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.installing import install_line

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]{{0,127}}))?", re.ASCII)
_BESIDE = ("*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt")  # what weights need beside them
_WEIGHTS = ("*.safetensors", "*.gguf", "*.bin", "*.pth", "*.pt")  # the first kind that is there
_NO_WEIGHTS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*")


def local(name: str | Path, weights: bool = True) -> Path:
    """The folder of a name: itself where it is there, or is no repository's; else the repository's files, downloaded.

    Files come from the cache of huggingface_hub where they are there, and only those that a model or an adapter needs,
    or, without `weights`, its tokenizer. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are understood.

    Raises:
        UserError: huggingface_hub is missing, or the repository is missing, gated, without weights, or out of reach.
    """
    found = None if isinstance(name, Path) or Path(name).exists() else _NAME.fullmatch(name)
    if found is None:
        return Path(name)
    if Path(name).parent.is_dir():  # a folder of this machine, whose name was mistyped
        raise UserError(f"{name}: no such file or folder")
    return _downloaded(found["repo"], found["revision"] or "main", str(name), weights)


def needed(files: Sequence[str]) -> list[str]:
    """The files of a repository that a model needs: a checkpoint of ours, or weights of one kind with configs."""
    if any(file.startswith("params/") for file in files):
        return [file for file in files if not file.startswith(".")]
    top = [file for file in files if "/" not in file and not any(fnmatch.fnmatch(file, bad) for bad in _NO_WEIGHTS)]
    for kind in _WEIGHTS:
        weights = fnmatch.filter(top, kind)
        if weights:
            return [*weights, *_beside(top)]
    return []


def _beside(files: Sequence[str]) -> list[str]:
    """Configs and the tokenizer."""
    return [file for file in files if any(fnmatch.fnmatch(file, beside) for beside in _BESIDE)]


def _downloaded(repo: str, revision: str, name: str, weights: bool) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(f"{name}: no such folder, and huggingface_hub is missing: {install_line('hub')}") from None
    place = f"{constants.ENDPOINT}/{repo}"
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision)
        there = [sibling.rfilename for sibling in info.siblings or ()]
        files = needed(there) if weights else _beside([file for file in there if "/" not in file])
        if weights and not files:
            raise UserError(f"{name}: {place} has no weights (looked for {', '.join(_WEIGHTS)} and params/)")
        if not any(file.startswith("tokenizer") for file in files) and not weights:
            raise UserError(f"{name}: {place} has no tokenizer.json or tokenizer.model")
        paths = [Path(huggingface_hub.hf_hub_download(repo, file, revision=revision)) for file in files]
        return paths[0].parents[len(Path(files[0]).parts) - 1]
    except errors.GatedRepoError:
        raise UserError(f"{name}: gated: accept the terms at {place}, and give your token in HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: {place} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such folder, and no {place} (a private one needs HF_TOKEN)") from None
    except UserError:
        raise
    except Exception as error:  # of whichever library the hub's client speaks HTTP with
        kept = _kept(repo, revision)
        if kept is None:
            raise UserError(
                f"{name}: cannot be downloaded from {place}, and is not kept here ({one_line(error)})"
            ) from None
        return kept


def _kept(repo: str, revision: str) -> Path | None:
    """What was downloaded of a repository before."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
