"""Prompts as files: `prompts/NAME.LANGUAGE.txt`, with the version in the first line.

`NAME.LANGUAGE@VERSION:HASH` traces an answer to its prompt. The hash covers the whole file, so that an edit without a
new version is noticed too, and its questions are asked again.
"""

import dataclasses
import functools
import hashlib
import re
from pathlib import Path

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.text import LANGUAGES

_FIRST_LINE = re.compile(r"^# version (\d+)$")
_GAP = re.compile(r"\{(\w+)\}")
_SYSTEM_END = "\n---\n"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt: the system text (may be empty), and the text with gaps like `{language}`."""

    version: str
    system: str
    text: str

    def fill(self, **values: object) -> tuple[str, str]:
        """(system, text) with every gap filled. Raises ValueError if values and gaps do not match."""
        gaps = set(_GAP.findall(self.system + self.text))
        if gaps != set(values):
            raise ValueError(f"{self.version} has the gaps {sorted(gaps)}, got {sorted(values)}")
        system, text = (_GAP.sub(lambda gap: str(values[gap[1]]), part) for part in (self.system, self.text))
        return system, text


@functools.cache
def load_prompt(folder: Path, name: str, language: str) -> Prompt:
    """Read `folder/NAME.LANGUAGE.txt`.

    Raises:
        UserError: there is no such file, or its first line is not `# version N`.
    """
    path = folder / f"{name}.{language}.txt"
    try:
        whole = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the prompt ({error.strerror})") from None
    first, _, body = whole.partition("\n")
    version = _FIRST_LINE.match(first)
    if version is None or not body.strip():
        raise UserError(f"{path}: a prompt must begin with a line '# version N', and text must follow")
    system, end, text = body.partition(_SYSTEM_END)
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    system, text = (system, text) if end else ("", body)
    return Prompt(f"{name}.{language}@{version[1]}:{digest}", system.strip(), text.strip())


def prompt_folder(package_file: str, configured: str) -> Path:
    """The folder of prompts: the configured one, or `prompts/` beside a module."""
    return Path(configured) if configured else Path(package_file).parent / "prompts"


def check_language(language: str) -> str:
    """The language. Raises UserError for one without prompts."""
    if language not in LANGUAGES:
        raise UserError(f"no language {language!r}: there are {', '.join(LANGUAGES)}")
    return language
