"""Values of a request's JSON, each checked where it is read: kind, range, length. What is wrong is an `ApiError`."""

import math
import re
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import printable
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.system.json_text import parse_json

_HALF_PAIRS = re.compile("[\ud800-\udfff]")  # what UTF-8 has no place for
_SHOWN = 60  # characters of a value that a message repeats
MOST_VALUES = 1 << 17  # of a request's JSON


def parsed(body: bytes | bytearray) -> Any:
    """The value of a request's JSON.

    Parsing holds up all threads, a second for some millions of values, so that their signs are counted before; those in
    texts count too.

    Raises:
        ApiError: there are too many values.
        UserError: it is no JSON.
    """
    if sum(body.count(sign) for sign in b",:[{") > MOST_VALUES:
        raise ApiError(f"the body: JSON of more than {MOST_VALUES} values", status=413, code="too_large")
    return parse_json(bytes(body), "the body")


class Fields:
    """An object of the request, whose fields are taken one by one; those that nobody took are unknown."""

    def __init__(self, value: Any, path: str = "") -> None:
        """`path`: where the object stands in the request, "" for the request itself."""
        if not isinstance(value, Mapping):
            raise ApiError(f"{path or 'the body'}: must be an object, not {shown(value)}", param=path or None)
        self._values, self._path = value, path
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def at(self, name: str) -> str:
        """Where a field stands in the request."""
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> Any:
        """The value of a field, None where it is missing or null."""
        self._taken.add(name)
        return self._values.get(name)

    def ignore(self, *names: str) -> None:
        """Fields that are known and change nothing here."""
        self._taken.update(names)

    def unknown(self) -> list[str]:
        """The fields that nobody took."""
        return [name for name in self._values if name not in self._taken]

    def fail(self, name: str, why: str) -> ApiError:
        """The error of a field."""
        return ApiError(f"{self.at(name)} {why}", param=self.at(name))

    def object(self, name: str) -> "Fields":
        """An object, an empty one where it is missing."""
        value = self.take(name)
        return Fields({} if value is None else value, self.at(name))

    def items(self, name: str, most: int) -> list[Any] | None:
        """A list of at most so many items."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.fail(name, f"must be a list, not {shown(value)}")
        if len(value) > most:
            raise self.fail(name, f"has {len(value)} items, and may have {most}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, f"must be true or false, not {shown(value)}")
        return value

    def text(self, name: str, longest: int) -> str | None:
        """A text of at most so many characters."""
        value = self.take(name)
        return None if value is None else as_text(value, self.at(name), longest)

    def number(self, name: str, least: float, most: float, *, above: bool = False) -> float | None:
        """A finite number in a range; `above`: not `least` itself."""
        value = self.take(name)
        return None if value is None else as_number(value, self.at(name), least, most, above=above)

    def whole(self, name: str, least: int, most: int | None = None) -> int | None:
        """A whole number in a range; 3.0 is one."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            end = f"between {least} and {most}" if most is not None else f"of {least} or more"
            raise self.fail(name, f"must be a whole number {end}, not {shown(value)}")
        return value


def as_text(value: Any, path: str, longest: int) -> str:
    """A text of at most so many characters; halves of surrogate pairs become U+FFFD."""
    if not isinstance(value, str):
        raise ApiError(f"{path} must be a text, not {shown(value)}", param=path)
    if len(value) > longest:
        raise ApiError(f"{path} has {len(value)} characters, and may have {longest}", param=path)
    try:
        value.encode()
    except UnicodeEncodeError:
        return _HALF_PAIRS.sub("\ufffd", value)
    return value


def as_number(value: Any, path: str, least: float, most: float, *, above: bool = False) -> float:
    """A finite number in a range; `above`: not `least` itself."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if good and isinstance(value, int) and abs(value) >= 2**63:  # what a float may have no place for
        value = math.inf if value > 0 else -math.inf
    if not good or not math.isfinite(value) or not least <= value <= most or (above and value == least):
        begin = f"above {least:g}" if above else f"of {least:g} or more"
        end = "" if most == math.inf else f", {most:g} at most"
        raise ApiError(f"{path} must be a finite number {begin}{end}, not {shown(value)}", param=path)
    return float(value)


def as_numbers(value: Any, path: str, most: int) -> tuple[float, ...]:
    """A list of at most so many finite numbers, none below 0."""
    if not isinstance(value, list) or len(value) > most:
        raise ApiError(f"{path} must be a list of at most {most} numbers, not {shown(value)}", param=path)
    return tuple(as_number(item, f"{path}[{place}]", 0.0, math.inf) for place, item in enumerate(value))


def shown(value: Any) -> str:
    """A value for a message: short, and on one line."""
    if isinstance(value, str):
        return printable(repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "..."))
    if isinstance(value, (list, dict)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return "an integer of many digits" if isinstance(value, int) and abs(value) >= 10**20 else repr(value)
