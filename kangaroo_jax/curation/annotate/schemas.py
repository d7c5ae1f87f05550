"""JSON out of answers, and whether it obeys a JSON schema."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.curation.annotate.requests import canonical
from kangaroo_jax.errors import UserError
from kangaroo_jax.installing import install_line


def parse_json(text: str) -> object:
    """The JSON value of an answer, also where a model wrapped it in a Markdown fence. Raises ValueError."""
    text = text.strip()
    if text.startswith("```"):
        text = text.split("\n", 1)[-1].rsplit("```", 1)[0]
    return json.loads(text)


def mistake(data: object, schema: Mapping[str, Any]) -> str:
    """What is wrong with a value by a schema (draft 2020-12), in one line; "" where nothing is.

    Raises UserError where `jsonschema` is not installed.
    """
    error = next(_validator(canonical(schema)).iter_errors(data), None)
    if error is None:
        return ""
    where = "/".join(str(step) for step in error.absolute_path)
    return " ".join(f"{where}: {error.message}".removeprefix(": ").split())[:200]


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
    except ImportError:
        raise UserError(f"the package jsonschema is missing: {install_line('curation')}") from None
    return jsonschema.Draft202012Validator(json.loads(schema))


def object_schema(**properties: Any) -> dict[str, Any]:
    """The schema of an object that has just these properties, as structured outputs want it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text_schema(longest: int = 4000) -> dict[str, Any]:
    """The schema of a text with something in it."""
    return {"type": "string", "minLength": 1, "maxLength": longest}
