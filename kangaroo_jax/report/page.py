"""Pages of one file that needs no network and no script, by the jinja2 templates of `templates/`."""

import base64
import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kangaroo_jax.errors import STEERS


@functools.cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["dictvalues"] = lambda values: list(values.values())
    found.tests["chinese"] = lambda text: any("\u3400" <= c <= "\u9fff" for c in text)
    return found


def render(template: str, **values: Any) -> Markup:
    """HTML of a template. Text in `values` is shown as it is and never runs; what is Markup is HTML already."""
    return Markup(STEERS.sub("\ufffd", _templates().get_template(template).render(values)))


def picture(data: bytes) -> str:
    """The address of a picture that the page itself holds. Raises ValueError where it is neither PNG nor JPEG."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8": "jpeg"}
    for mark, kind in kinds.items():
        if data.startswith(mark):
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    raise ValueError("frames must be the bytes of PNG or JPEG files")
