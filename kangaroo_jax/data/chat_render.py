"""Renders a chat template (jinja2) that came with a model, as transformers does; for a process of its own.

The template is a stranger's: it runs in jinja2's sandbox, in which values cannot be changed and no attribute leads out,
and in a process that is ended when it takes too long or too much memory (`system.guard`).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kangaroo_jax.errors import UserError, one_line

LONGEST_TEMPLATE = 1 << 18  # characters
LONGEST_TEXT = 1 << 22  # characters of what a template makes


class _Generation(Extension):
    """`{% generation %}`, by which templates mark the assistant's words: what is inside stands as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, Any]) -> str:
    """The text of messages ("role", "content"), with a model's tokens ("bos_token", ...) among the variables.

    There is no clock: a template that would write today's date writes the date that it has for such a case.

    Raises:
        UserError: no template, one that refuses these messages, or whose text is too long.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise UserError(f"{len(template)} characters are no chat template; more than {LONGEST_TEMPLATE} are not read")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    pieces, length = [], 0
    try:
        compiled = environment.from_string(template)
        for piece in compiled.generate(messages=messages, tools=None, documents=None, **variables):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                raise UserError(f"makes a text of more than {LONGEST_TEXT} characters")
    except (UserError, MemoryError):
        raise
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"line {error.lineno}: {one_line(error)[:160]}") from None
    except Exception as error:  # a template can make any of Python's errors
        raise UserError(one_line(error)[:160] or type(error).__name__) from None
    return "".join(pieces)
