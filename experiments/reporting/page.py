"""HTML pages in one file: templates filled with plain values, which are escaped, the one style sheet inside, nothing
fetched and no script."""

import base64
import io
import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from experiments.reporting import drawing

IMAGE_SIDE, IMAGE_BYTES, LOSSLESS_SIDE = 160, 20_000, 48
MOST_LETTERS = 60


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(cut=cut, number=number, data_uri=data_uri)
    made.globals.update(colours=drawing.COLOURS, tiny=lambda image: max(image.size) <= LOSSLESS_SIDE)
    return made


def render(template: str, **values: Any) -> Markup:
    """A file of templates/ with these values, as ASCII: other letters become references to characters."""
    page = _environment().get_template(template).render(values)
    return Markup(page.encode("ascii", "xmlcharrefreplace").decode())


def cut(value: Any, most: int = MOST_LETTERS) -> str:
    """A text of at most so many letters, as `abc...`."""
    words = str(value)
    return words if len(words) <= most else words[: most - 3] + "..."


def number(value: float | None, percent: bool = False) -> str:
    """A number as people read it, with all its digits in the element's `value`; `-` for none."""
    if value is None or not math.isfinite(value):
        return "-"
    whole = float(value).is_integer() and not percent
    exact = int(value) if whole else repr(float(value))
    return Markup('<data value="{}">{}</data>').format(exact, drawing.plain(value, percent))


def data_uri(image: Image.Image) -> str:
    """Small images as they are (PNG), larger ones as JPEG of at most IMAGE_SIDE pixels and IMAGE_BYTES."""
    image = image.convert("RGB")
    if max(image.size) <= LOSSLESS_SIDE:
        return _uri(image, "PNG")
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    for quality in (85, 60, 30):
        uri = _uri(image, "JPEG", quality=quality)
        if len(uri) <= IMAGE_BYTES:
            return uri
    return _uri(image.resize([max(1, side // 2) for side in image.size]), "JPEG", quality=60)


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
