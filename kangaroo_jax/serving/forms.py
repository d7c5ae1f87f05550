"""The form that a request wants its answer to have: OpenAI's `response_format`, vLLM's `structured_outputs`."""

import dataclasses
import json
from typing import Any

from kangaroo_jax.inference.grammars import LONGEST
from kangaroo_jax.serving.failures import ApiError
from kangaroo_jax.serving.reading import Fields, as_text, shown

MOST_CHOICES = 1000
_KINDS = ("json", "regex", "choice")
_OLD = tuple(f"guided_{kind}" for kind in _KINDS)  # vLLM's names before `structured_outputs`


@dataclasses.dataclass(frozen=True)
class Form:
    """A grammar that is not compiled yet: see `Grammars.of`."""

    kind: str
    text: str
    field: str  # where the request has it


def form_of(fields: Fields) -> Form | None:
    """The form that a request asks for, None where any text will do. Raises ApiError."""
    nested = fields.object("structured_outputs")
    forms = [_of_response(fields), *(_of_kind(nested, kind, kind) for kind in _KINDS)]
    forms += [_of_kind(fields, old, kind) for old, kind in zip(_OLD, _KINDS, strict=True)]
    for name in nested.unknown():
        raise nested.fail(name, f"is not supported by this server: there are {', '.join(_KINDS)}")
    wanted = [form for form in forms if form is not None]
    if len(wanted) > 1:
        first, second = wanted[0].field, wanted[1].field
        raise ApiError(f"{second}: {first} says already what form the answer has", param=second)
    return wanted[0] if wanted else None


def _of_response(fields: Fields) -> Form | None:
    if "response_format" not in fields:
        fields.take("response_format")
        return None
    wanted = fields.object("response_format")
    kind = wanted.text("type", 32)
    if kind == "text":
        return None
    if kind == "json_object":
        return Form(kind, "", wanted.at("type"))
    if kind != "json_schema":
        raise wanted.fail("type", f"must be text, json_object or json_schema, not {shown(kind)}")
    inner = wanted.object("json_schema")
    inner.ignore("name", "description", "strict")
    if "schema" not in inner:
        raise inner.fail("schema", "is missing")
    return _of_kind(inner, "schema", "json")


def _of_kind(fields: Fields, name: str, kind: str) -> Form | None:
    value, where = fields.take(name), fields.at(name)
    if value is None:
        return None
    if kind == "json":
        if not isinstance(value, (str, dict)):
            raise fields.fail(name, f"must be a JSON schema, not {shown(value)}")
        return Form("json_schema", _bounded(fields, name, value), where)
    if kind == "regex":
        return Form(kind, as_text(value, where, LONGEST), where)
    choices = fields.items(name, MOST_CHOICES)
    if not choices:
        raise fields.fail(name, "must be a list of texts to choose from")
    texts = [as_text(choice, f"{where}[{place}]", LONGEST) for place, choice in enumerate(choices)]
    if "" in texts:
        raise fields.fail(name, "has an empty text")
    return Form(kind, _bounded(fields, name, texts), where)


def _bounded(fields: Fields, name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > LONGEST:
        raise fields.fail(name, f"has {len(text)} characters, and may have {LONGEST}")
    return as_text(text, fields.at(name), LONGEST)
