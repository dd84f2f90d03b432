"""A self-contained page from a template: ``base.html`` has the style and the parts that pages share."""

import html
import math
import os
import re
from pathlib import Path
from typing import Any, Optional, Sequence

from kd_mm.lab.report.plots import require

TEMPLATES = Path(__file__).parent / 'templates'
#: What is shown where there is no number.
NOTHING = '–'


def percent(value: Optional[float], digits: int = 1) -> str:
    """A share of 1 in points of 100.

    Example:
        >>> percent(0.4321), percent(None)
        ('43.2', '–')
    """
    return NOTHING if value is None or not math.isfinite(value) else f'{100 * value:.{digits}f}'


def signed(value: Optional[float], digits: int = 1) -> str:
    """A difference of shares in points, with its sign.

    Example:
        >>> signed(0.05), signed(-0.02)
        ('+5.0', '-2.0')
    """
    return NOTHING if value is None or not math.isfinite(value) else f'{100 * value:+.{digits}f}'


def decimal(value: Optional[float], digits: int = 2) -> str:
    """A number.

    Example:
        >>> decimal(0.123), decimal(None)
        ('0.12', '–')
    """
    return NOTHING if value is None or not math.isfinite(value) else f'{value:.{digits}f}'


def code(text: str) -> Any:
    """Text whose parts between backticks are code, for a page.

    Example:
        >>> print(code('`a < b` is so'))
        <code>a &lt; b</code> is so
    """
    import markupsafe
    return markupsafe.Markup(re.sub(r'`([^`]*)`', r'<code>\1</code>', html.escape(text, quote=False)))


def difference(one: Optional[float], two: Optional[float]) -> Optional[float]:
    """``one - two`` where both are known."""
    return None if one is None or two is None else one - two


def render(template: str, folders: Sequence['str | os.PathLike[str]'] = (), **values: Any) -> str:
    """A page.

    Args:
        template: name of a file in one of the folders, or in ours.
        folders: looked at first.
        values: for the template.

    Raises:
        ValueError: jinja2 or matplotlib is missing.
    """
    require('a page')
    import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*map(str, folders), str(TEMPLATES)]), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(percent=percent, signed=signed, decimal=decimal, code=code)
    environment.globals.update(difference=difference, zip=zip)
    return environment.get_template(template).render(**values)


def write(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(text, encoding='utf-8')
    os.replace(part, path)
