"""How the turns of a conversation stand in a prompt: in Llama 3's format, or by a template that came with a tokenizer.

A format says what stands around the contents: a *frame* before the first, between two, and after the last. Contents are
never part of a template's input (marks are, in their places): text that looks like a special token stays text.

Beside the tokenizer's file stand `chat_format.json`, which we write, or the files of Hugging Face:
tokenizer_config.json, special_tokens_map.json, chat_template.jinja and generation_config.json.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kangaroo_jax.data.chat_render import render
from kangaroo_jax.errors import UserError, one_line
from kangaroo_jax.system.guard import Guard
from kangaroo_jax.system.json_text import read_json
from kangaroo_jax.system.processes import Lost

FORMAT_FILE = "chat_format.json"
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The format of `llama3_format` as a template; content is a text, or a list of media and text parts.
LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{% if message['content'] is string -%}
{{ message['content'] | trim }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- else -%}<{{ part['type'] }}>
{% endif -%}
{%- endfor -%}
{%- endif -%}
<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{% endif -%}
"""
SECONDS, MEMORY_MIB = 10.0, 512  # for one rendering of a template
_MARK, _MARKS = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")  # stand in the contents' places


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What the files beside a tokenizer say of a model's chats.

    Attributes:
        template: the chat template (jinja2), "" where there is none.
        tokens: by its name in TOKENS, the text of a special token.
        stop_ids: tokens that end an answer.
        begins: whether plain text begins with `bos_token`; None where that is not said.
    """

    template: str = ""
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    begins: bool | None = None

    def to_json(self) -> str:
        """The text of `chat_format.json`."""
        plain = dataclasses.asdict(self) | {"tokens": dict(sorted(self.tokens.items()))}
        return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def settings_beside(path: Path) -> ChatSettings:
    """The settings beside a tokenizer's file. Raises UserError for files that are not what they should be."""
    folder = path.parent
    if (folder / FORMAT_FILE).is_file():
        raw = read_json(folder / FORMAT_FILE)
        try:
            tokens = {str(name): str(text) for name, text in raw["tokens"].items()}
            stop = tuple(int(token) for token in raw["stop_ids"])
            return ChatSettings(str(raw["template"]), tokens, stop, raw.get("begins"))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{folder / FORMAT_FILE}: is no chat format; convert the model again") from None
    raw = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            raw |= read_json(folder / name)
    template = raw.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    if isinstance(template, list):  # several by name
        named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    tokens = {name: _text(raw[name]) for name in TOKENS if raw.get(name)}
    stop = _stop_ids(folder / "generation_config.json")
    begins = raw.get("add_bos_token")
    return ChatSettings(str(template or ""), tokens, stop, begins if isinstance(begins, bool) else None)


def _text(token: Any) -> str:
    """A token's text, which may be in an `AddedToken` object."""
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


def _stop_ids(path: Path) -> tuple[int, ...]:
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [found]
    return tuple(token for token in ids if type(token) is int and token >= 0)


# ------------------------------------------------------------------------------------ formats

Item = int | str  # a special token, or text that is encoded together with its neighbours


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands between two contents.

    Attributes:
        items: special tokens and texts.
        end: how many of them end the turn before: an assistant learns to say these.
    """

    items: tuple[Item, ...]
    end: int


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """Frames of conversations.

    Attributes:
        joins: whether texts of frames are encoded together with the contents beside them.
        frames: of the turns' roles, of whether the header of an answer to come follows, and of whether the last turn
            goes on with the answer; one more frame than turns. Raises UserError where there is no such conversation.
        eot: the token that ends an assistant's turn.
    """

    joins: bool
    frames: Callable[[tuple[str, ...], bool, bool], tuple[Frame, ...]]
    eot: int


def llama3_format(bos: int, header: tuple[int, int], eot: int, encode: Callable[[str], list[int]]) -> ChatFormat:
    """`<|begin_of_text|><|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>...`"""

    @functools.lru_cache(maxsize=64)
    def heading(role: str) -> tuple[int, ...]:
        return (header[0], *encode(role), header[1], *encode("\n\n"))

    @functools.lru_cache(maxsize=256)
    def frames(roles: tuple[str, ...], ask: bool, leave_open: bool) -> tuple[Frame, ...]:
        headings = [heading(role) for role in roles] + [heading("assistant") if ask and not leave_open else ()]
        last = [] if leave_open and roles else [Frame((*((eot,) if roles else (bos,)), *headings[-1]), len(roles[:1]))]
        first = [Frame((bos, *headings[0]), 0)] if roles else []
        between = [Frame((eot, *one), 1) for one in headings[1:-1]]
        return (*first, *between, *(last or [Frame((), 0)]))

    return ChatFormat(joins=False, frames=frames, eot=eot)


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token as a template writes it; `lstrip` and `rstrip` say whether it takes the white space beside it."""

    token: int
    lstrip: bool = False
    rstrip: bool = False


def template_format(
    settings: ChatSettings, specials: Mapping[str, Special], encode: Callable[[str], list[int]] | None, where: Path
) -> ChatFormat:
    """The format of a template.

    Args:
        settings: with a template.
        specials: the special tokens by their text.
        encode: encodes text of frames by itself; None where it is to be encoded together with the contents.
        where: the tokenizer's file, for messages.

    Raises:
        UserError: the template does not say how an answer is asked for, or how it ends.
    """
    pattern = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")

    def items(text: str) -> list[Item]:
        found: list[Item] = []
        strip = False
        for number, piece in enumerate(pattern.split(text)):
            if number % 2:
                special = specials[piece]
                if special.lstrip and found and isinstance(found[-1], str):
                    found[-1] = found[-1].rstrip()
                found.append(special.token)
                strip = special.rstrip
            elif piece:
                found.append(piece.lstrip() if strip else piece)
        return [item for item in found if item != ""]

    @functools.lru_cache(maxsize=1024)
    def frames(roles: tuple[str, ...], ask: bool, leave_open: bool) -> tuple[Frame, ...]:
        pieces = _around(settings, roles, ask and not leave_open, where)
        made = []
        for number, piece in enumerate(pieces):
            parts = [] if leave_open and number == len(roles) else items(piece)
            end = next((i + 1 for i, part in enumerate(parts) if isinstance(part, int)), 0)
            if number and roles[number - 1] == "assistant" and not end and not (leave_open and number == len(roles)):
                raise UserError(f"{where}: the chat template ends the assistant's turn by no special token; not read")
            if encode is not None:
                done = [[part] if isinstance(part, int) else encode(part) for part in parts]
                end, parts = sum(map(len, done[:end])), [token for tokens in done for token in tokens]
            made.append(Frame(tuple(parts), end if number else 0))
        return tuple(made)

    _, before, last = frames(("user", "assistant"), False, False)
    mark = last.items[last.end - 1]
    asked, unasked = (frames(("user",), ask, False)[-1].items for ask in (True, False))
    if asked == unasked and _bare(asked) != _bare(before.items):
        raise UserError(f"{where}: the chat template does not ask for an answer (add_generation_prompt); not read")
    assert isinstance(mark, int)
    return ChatFormat(joins=encode is None, frames=frames, eot=mark)


def _bare(items: Sequence[Item]) -> list[Item]:
    """Items without the white space at their end."""
    bare = [*items[:-1], *(item.rstrip() if isinstance(item, str) else item for item in items[-1:])]
    return [item for item in bare if item != ""]


@functools.cache
def _renderer(seconds: float, memory_mib: int) -> Guard:
    return Guard(render, seconds=seconds, memory_mib=memory_mib)


def _around(settings: ChatSettings, roles: Sequence[str], ask: bool, where: Path) -> list[str]:
    """The template's text around the contents. Raises UserError where it has none for these roles."""
    messages = [{"role": role, "content": _MARK.format(number)} for number, role in enumerate(roles)]
    variables = {**settings.tokens, "add_generation_prompt": ask}
    try:
        text, _, _ = _renderer(SECONDS, MEMORY_MIB).call(settings.template, messages, variables)
    except (UserError, Lost) as error:
        raise UserError(f"{where}: its chat template cannot be used for {_told(roles)}: {one_line(error)}") from None
    pieces = _MARKS.split(text)
    found = [int(number) for number in pieces[1::2]]
    if found != list(range(len(roles))):
        raise UserError(
            f"{where}: its chat template does not write the turns of {_told(roles)} one after another, each once"
        )
    return pieces[::2]


def _told(roles: Sequence[str]) -> str:
    shown = [*roles[:6], *(["..."] if len(roles) > 6 else [])]
    return f"a conversation of {', '.join(shown) or 'no turns'}"


PROBES = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))


def writes_llama3(
    settings: ChatSettings,
    plain: ChatFormat,
    specials: Mapping[str, Special],
    encode: Callable[[str], list[int]],
    where: Path,
) -> bool:
    """Whether a template writes Llama 3's format as it is, without a date or a system turn of its own."""
    if settings.template == LLAMA3:
        return True
    try:
        made = template_format(settings, specials, encode, where)
        return all(made.frames(roles, True, False) == plain.frames(roles, True, False) for roles in PROBES)
    except UserError:
        return False
