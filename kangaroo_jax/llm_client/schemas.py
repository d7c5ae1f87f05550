"""Parses JSON from answers, and checks it against a JSON schema."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import UserError
from kangaroo_jax.llm_client.requests import canonical
from kangaroo_jax.system.installing import install_line
from kangaroo_jax.system.json_text import parse_json


def json_of(answer: str) -> Any:
    """The JSON value of an answer, even inside a Markdown fence. Raises ValueError."""
    text = answer.strip()
    if text.startswith("```"):
        text = text.split("\n", 1)[-1].rsplit("```", 1)[0]
    try:
        return parse_json(text, "the answer")
    except UserError as error:
        raise ValueError(str(error)) from None


def mistake(data: object, schema: Mapping[str, Any]) -> str:
    """The error of a value by a schema (draft 2020-12), in one line; "" if it is valid.

    Raises UserError if `jsonschema` is not installed.
    """
    validator = _validator(canonical(schema))
    try:
        error = next(validator.iter_errors(data), None)
    except RecursionError:  # raised while the message prints the value
        return "nested too deep"
    if error is None:
        return ""
    where = "/".join(str(step) for step in error.absolute_path)
    return " ".join(f"{where}: {error.message}".removeprefix(": ").split())[:200]


def writable(data: Any) -> Any:
    """The same value with "?" for each lone surrogate in its texts, which UTF-8 cannot encode."""
    if isinstance(data, str):
        return data.encode("utf-8", "replace").decode()
    if isinstance(data, list):
        return [writable(one) for one in data]
    return {key: writable(value) for key, value in data.items()} if isinstance(data, dict) else data


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
    except ImportError:
        raise UserError(f"the package jsonschema is missing: {install_line('curation')}") from None
    return jsonschema.Draft202012Validator(json.loads(schema))


def object_schema(**properties: Any) -> dict[str, Any]:
    """The schema of an object with exactly these properties, in the form that structured outputs require."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def text_schema(longest: int = 4000) -> dict[str, Any]:
    """The schema of a text that is not empty."""
    return {"type": "string", "minLength": 1, "maxLength": longest}
