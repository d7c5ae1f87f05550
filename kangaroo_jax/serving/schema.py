"""What /openapi.json says of requests: for clients that are made from it, and for tests that draw requests from it.

What is refused or has no effect here is left out; fields that are not named are dropped (`protocol`).
"""

from typing import Any

from kangaroo_jax.serving.forms import MOST_CHOICES
from kangaroo_jax.serving.limits import Limits
from kangaroo_jax.serving.protocol import (
    LONGEST_NAME,
    LONGEST_STOP,
    MOST_LOGPROBS,
    MOST_PARTS,
    MOST_STOP_IDS,
    MOST_STOPS,
)

Schema = dict[str, Any]

_SCHEMA: Schema = {"type": "object", "description": "a JSON schema"}
_CHOICES: Schema = {
    "type": "array",
    "items": {"type": "string", "minLength": 1},
    "minItems": 1,
    "maxItems": MOST_CHOICES,
}
_FORMATS: list[Schema] = [
    {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}},
    {
        "type": "object",
        "required": ["type", "json_schema"],
        "properties": {
            "type": {"const": "json_schema"},
            "json_schema": {
                "type": "object",
                "required": ["schema"],
                "properties": {"name": {"type": "string"}, "strict": {"type": "boolean"}, "schema": _SCHEMA},
            },
        },
    },
]
_FLAG: Schema = {"type": ["boolean", "null"]}
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def chat(limits: Limits) -> Schema:
    """What FastAPI is told of /v1/chat/completions."""
    stop = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
    properties = _prompt(limits) | {
        "max_completion_tokens": _whole(0),
        "max_tokens": _whole(0),
        "n": _whole(1, limits.max_choices),
        "stream": _FLAG,
        "temperature": _number(0, 100),
        "top_p": _number(0, 1, above=True),
        "top_k": _whole(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(0, 100, above=True),
        "seed": _whole(-(2**63), 2**64 - 1),
        "logit_bias": {
            "type": ["object", "null"],
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 300,
        },
        "stop": {"anyOf": [{"type": "null"}, stop, {"type": "array", "items": stop, "maxItems": MOST_STOPS}]},
        "stop_token_ids": {"type": ["array", "null"], "items": _whole(0, 2**31 - 1), "maxItems": MOST_STOP_IDS},
        "ignore_eos": _FLAG,
        "logprobs": _FLAG,
        "response_format": {"anyOf": [{"type": "null"}, *_FORMATS]},
        "structured_outputs": _object({"json": _SCHEMA, "regex": {"type": "string"}, "choice": _CHOICES}),
        "top_logprobs": _whole(0, MOST_LOGPROBS),
        "stream_options": _object({"include_usage": _FLAG}),
    }
    return _route("createChatCompletion", {"type": "object", "required": ["messages"], "properties": properties})


def tokenize(limits: Limits) -> Schema:
    """What FastAPI is told of /tokenize."""
    common = {"add_special_tokens": _FLAG, "return_token_strs": _FLAG}
    text = {"prompt": {"type": "string"}, "model": {"type": ["string", "null"]}} | common
    return _route(
        "tokenize",
        {
            "anyOf": [
                {"type": "object", "required": ["prompt"], "properties": text},
                {"type": "object", "required": ["messages"], "properties": _prompt(limits) | common},
            ]
        },
    )


def _prompt(limits: Limits) -> Schema:
    """Fields of messages and of how they are read."""
    address = {"type": "string", "description": "data:TYPE;base64,..., file:///PATH or https://HOST/PATH"}
    name = {"type": ["string", "null"], "maxLength": LONGEST_NAME}
    frames = {"type": "array", "items": address, "minItems": 1, "maxItems": limits.max_listed_frames}
    times = {"type": "array", "items": {"type": "number", "minimum": 0}, "maxItems": limits.max_listed_frames}
    text = {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    }
    parts = [text]
    for kind, value in (
        ("image_url", _object({"url": address}, "url")),
        ("video_url", _object({"url": address}, "url")),
        ("video", frames),
    ):
        properties = {"type": {"const": kind}, kind: value, "uuid": name}
        if kind == "video":
            properties["frame_times"] = times
        parts.append({"type": "object", "required": ["type", kind], "properties": properties})
    wishes: Schema = {
        "fps": {"type": "number", "exclusiveMinimum": 0},
        "num_frames": _whole(-1),
        "max_frames": _whole(1),
        "min_frames": _whole(1),
    }
    return {
        "model": name,
        "messages": {
            "type": "array",
            "items": {"anyOf": [_message("user", parts), _message("assistant", [text]), _message("system", [text])]},
            "minItems": 1,
            "maxItems": limits.max_messages,
        },
        "media_io_kwargs": _object({"video": _object(wishes)}),
        "mm_processor_kwargs": _object(wishes | {"do_sample_frames": _FLAG}),
        "add_generation_prompt": _FLAG,
        "continue_final_message": _FLAG,
        "cache_salt": name,
    }


def _message(role: str, parts: list[Schema]) -> Schema:
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": parts}, "maxItems": MOST_PARTS}]}
    properties = {"role": {"const": role}, "content": content}
    return {"type": "object", "required": ["role", "content"], "properties": properties}


def _whole(least: int, most: int | None = None) -> Schema:
    bound = {} if most is None else {"maximum": most}
    return {"type": ["integer", "null"], "minimum": least} | bound


def _number(least: float, most: float, *, above: bool = False) -> Schema:
    return {"type": ["number", "null"], "exclusiveMinimum" if above else "minimum": least, "maximum": most}


def _object(properties: Schema, *required: str) -> Schema:
    kinds: Any = "object" if required else ["object", "null"]
    return {"type": kinds, "properties": properties} | ({"required": list(required)} if required else {})


def _route(name: str, body: Schema) -> Schema:
    """An operation whose request is this, and whose mistakes are told in OpenAI's form."""
    told = {"content": {"application/json": {"schema": _ERROR}}}
    return {
        "operationId": name,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"4XX": {"description": "What is wrong with the request"} | told}
        | {"5XX": {"description": "Why there is no answer"} | told},
    }
