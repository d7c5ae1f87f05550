"""The turns of a record: the role, the text and the loss weight of each."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kangaroo_jax.data.annotations.conversation import Turn, spaced
from kangaroo_jax.data.annotations.format_media import shown
from kangaroo_jax.errors import UserError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}


_TOOLS = ("tool", "function", "function_call", "tool_call", "observation", "tool_response")


@dataclasses.dataclass(frozen=True)
class Keys:
    """How a list of turns is written: the keys of a turn, and the names of the roles."""

    role: str = "role"
    text: str = "content"
    roles: Mapping[str, str] = dataclasses.field(default_factory=lambda: _ROLES)


def keys_of(raw: Any, key: str) -> Keys:
    """The keys that the turns of a record have: `from` and `value`, or `role` and `content`."""
    first = next((turn for turn in raw if isinstance(turn, dict)), {}) if isinstance(raw, list) else {}
    tagged = {"from", "value"} & first.keys() or (key == "conversations" and not {"role", "content"} & first.keys())
    return Keys("from", "value") if tagged and key != "messages" else Keys()


def read_turns(raw: Any, key: str, keys: Keys, where: str) -> tuple[Turn, ...]:
    """The turns in the list under a key of a record. Raises UserError."""
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: '{key}' must be a list of turns, found {shown(raw)}")
    turns = []
    for number, turn in enumerate(raw, start=1):
        role = role_of(turn, keys, number, where)
        text = turn.get(keys.text)
        if not isinstance(text, str):
            needed = f"'{keys.role}' ({_known(keys)}) and a text '{keys.text}'"
            raise UserError(f"{where}: turn {number} needs {needed}, found {shown(turn)}")
        turns.append(Turn(role, text if role == "assistant" else spaced(text), loss_of(turn, where)))
    return alternate(turns, where)


def role_of(turn: Any, keys: Keys, number: int, where: str) -> str:
    """Who speaks in a turn. Raises UserError."""
    found = turn.get(keys.role) if isinstance(turn, dict) else None
    role = keys.roles.get(str(found)) or keys.roles.get(str(found).lower())
    if role is None:
        tools = "; calls of tools are not read" if found in _TOOLS else ""
        shows = shown(turn if found is None else found)
        raise UserError(
            f"{where}: turn {number} needs '{keys.role}' ({_known(keys)}) and a text '{keys.text}', "
            f"found {shows}{tools}"
        )
    return role


def _known(keys: Keys) -> str:
    if keys.roles is not _ROLES:
        return ", ".join(keys.roles)
    return "human, gpt or system" if keys.role == "from" else "user, assistant or system"


def alternate(turns: Sequence[Turn], where: str) -> tuple[Turn, ...]:
    """The turns, if user and assistant alternate. Raises UserError."""
    roles = [turn.role for turn in turns]
    talk = roles[1:] if roles and roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(talk)) or not talk:
        raise UserError(f"{where}: turns must alternate human, gpt, human... after at most one system turn")
    return tuple(turns)


def loss_of(turn: dict[str, Any], where: str) -> float:
    """ms-swift's `loss` (true or false) and `loss_scale` (a factor). Raises UserError."""
    value = turn.get("loss_scale") if turn.get("loss_scale") is not None else turn.get("loss")
    if value is None:
        return 1.0
    if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf or value > 1e15:
        raise UserError(f"{where}: 'loss' of a turn must be true, false or a factor, found {shown(value)}")
    return float(value)


def rounds_of(pairs: Sequence[Any], names: str, where: str, system: Any = None) -> tuple[Turn, ...]:
    """Turns of (question, answer) pairs, after a system's text. Raises UserError naming the keys `names`."""
    turns = [Turn("system", system)] if isinstance(system, str) and system else []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{where}: {names} must be text")
        turns += [Turn("user", spaced(pair[0])), Turn("assistant", pair[1])]
    return tuple(turns)
