"""From a page's data to HTML, through jinja2 alone."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tlcli import __version__
from tlcli.runs.report import words
from tlcli.runs.report.saving import GENERATOR

TEMPLATES = Path(__file__).parent / "templates"
_NO_CHARACTER = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, page: object) -> str:
    """The HTML of a page; everything that the template takes from it is escaped."""
    sheet = style()
    return (
        _environment()
        .get_template(template)
        .render(page=page, style=sheet, style_digest=digest(sheet), generator=f"{GENERATOR} {__version__}")
    )


@cache
def style() -> Markup:
    """The style sheet: ours, so it is not escaped."""
    return Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))


def digest(sheet: str) -> str:
    """A style sheet's digest as a Content-Security-Policy names it (CSP Level 3, section 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()


def printable(value: Any) -> Any:
    """The same text without what no HTML file may hold: half a surrogate pair of a file's name, control characters."""
    if isinstance(value, Markup):
        return value
    return _NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", str(value))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent, count=words.count, seconds=words.seconds, plural=words.plural, figure=words.figure,
        rate=words.rate,
    )  # fmt: skip
    return environment
