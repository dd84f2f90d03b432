"""Curves, bars and tables of shares as SVG that stands inside a page, drawn by matplotlib.

Text stays text, in the page's font and colour, so that a figure is readable on light and on dark, and at any zoom.
"""

import io
import re
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

#: Colour of each role, and of what is neither.
COLOURS = {'teacher': '#7d8590', 'plain': '#d9822b', 'student': '#2b8a6b'}
OTHERS = ('#4c78a8', '#b5499b', '#c2a300', '#6b5bd2', '#3aa7b8', '#a8543a', '#70a63a', '#d1495b')
#: Stands for the page's own colour of text in what matplotlib writes.
_INK = '#010203'

#: Names in a row of the key below a chart.
KEYS = 3

#: (name, colour, [(x, y)]); y may be None.
Line = Tuple[str, str, Sequence[Tuple[Any, Any]]]


def require(what: str) -> None:
    """Say what to install where the libraries of a page are missing.

    Raises:
        ValueError: naming the library and the command.
    """
    for module in ('jinja2', 'matplotlib'):
        try:
            __import__(module)
        except ImportError as error:
            raise ValueError(f'{what} needs {module}, which cannot be imported ({error}). Install it: '
                             "pip install 'kd_mm[report]'") from error


@contextmanager
def _figure(title: str, size: Tuple[float, float], found: List[str]) -> Iterator[Any]:
    """An axis to draw on; the SVG is added to ``found``."""
    import matplotlib
    from matplotlib.figure import Figure
    settings = {
        'svg.fonttype': 'none', 'svg.hashsalt': title, 'font.size': 11, 'font.family': 'sans-serif',
        'text.color': _INK, 'axes.labelcolor': _INK, 'axes.edgecolor': '#88888888', 'xtick.color': _INK,
        'ytick.color': _INK, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.axisbelow': True,
        'grid.color': '#888888', 'grid.alpha': 0.3, 'grid.linewidth': 0.7, 'legend.frameon': False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout='constrained')
        axis = figure.subplots()
        yield axis
        stream = io.StringIO()
        figure.savefig(stream, format='svg', transparent=True, metadata={'Date': None, 'Creator': None})
    # The page's own text as the title: it breaks where a phone is narrow.
    found.append(f'<figure class="plot"><figcaption>{_escaped(title)}</figcaption>{inline(stream.getvalue(), title)}'
                 '</figure>')


def inline(text: str, title: str) -> str:
    """An SVG file as an element of a page: no prologue, no metadata, no address, the page's colour of text."""
    text = text[text.index('<svg'):]
    text = re.sub(r'<metadata>.*?</metadata>\s*', '', text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns|xmlns:xlink)="[^"]*"', '', text)
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', lambda match: (
        f'<svg viewBox="{match.group(1)}" role="img" aria-label="{_escaped(title)}">'), text, count=1)
    text = re.sub(r"font: (?:bold )?([\d.]+)px [^;\"]*", lambda match: (
        f'font: {"bold " if "bold" in match.group(0) else ""}{match.group(1)}px system-ui, sans-serif'), text)
    return text.replace(_INK, 'currentColor').strip()


def _escaped(text: str) -> str:
    return text.replace('&', '&amp;').replace('<', '&lt;').replace('"', '&quot;')


def _finite(points: Sequence[Tuple[Any, Any]]) -> List[Tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and np.isfinite(y)]


def lines(title: str, curves: Sequence[Line], x: str, y: str = '', low: Optional[float] = None,
          high: Optional[float] = None, marks: bool = False, diagonal: bool = False, key: bool = True) -> str:
    """A chart of lines; points that are not finite are left out, and without any point it is empty.

    Args:
        title: above it.
        curves: (name, colour, [(x, y)]); of several with one name the first is in the key.
        x, y: what the axes are.
        low, high: limits of y; None fits them, above to 98 % of 50 points or more: the first losses would flatten all.
        marks: a mark at each point.
        diagonal: a thin line where x equals y.
        key: whether names are shown.
    """
    kept = [(name, colour, _finite(points)) for name, colour, points in curves]
    kept = [entry for entry in kept if entry[2]]
    if not kept:
        return ''
    found: List[str] = []
    names = len({name for name, _, _ in kept}) if key else 0
    with _figure(title, (5.2, 3.1 + 0.22 * (-(-names // KEYS) if names > 1 else 0)), found) as axis:
        shown = set()
        for name, colour, points in kept:
            axis.plot(*zip(*points), color=colour, linewidth=1.8, marker='o' if marks else None, markersize=4,
                      label=f'_{name}' if name in shown else name)
            shown.add(name)
        if diagonal:
            axis.plot((0, 1), (0, 1), color='#888888', linewidth=1, linestyle=':')
        values = sorted(value for _, _, points in kept for _, value in points)
        bottom = values[0] if low is None else low
        top = high if high is not None else values[-1] if low is not None or len(values) < 50 else (
            values[int(0.98 * (len(values) - 1))])
        room = 0.04 * max(top - bottom, 1e-6)
        axis.set_ylim(bottom - (0 if low is not None else room), top + room)
        axis.ticklabel_format(useOffset=False)
        if all(float(value).is_integer() for _, _, points in kept for value, _ in points):
            axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(True)
        if key and len(shown) > 1:  # inside it would lie over a line
            axis.figure.legend(loc='outside lower center', ncols=min(len(shown), KEYS), fontsize=10)
    return found[0]


def bars(title: str, names: Sequence[str], groups: Mapping[str, Sequence[Optional[float]]], x: str,
         colours: Optional[Mapping[str, str]] = None) -> str:
    """Horizontal bars, a group for each name: rows that a phone can show, however long the names are.

    Args:
        title: above it.
        names: of the rows, the first one at the top.
        groups: name of a colour -> values, None for no bar.
        x: what is measured.
        colours: of the groups; default those of the roles.
    """
    if not names or not groups:
        return ''
    found: List[str] = []
    high = 0.8 / len(groups)
    with _figure(title, (5.2, 1.0 + (0.16 * len(groups) + 0.2) * len(names)), found) as axis:
        for index, (group, values) in enumerate(groups.items()):
            places = np.arange(len(names)) + (index - (len(groups) - 1) / 2) * high
            colour = (colours or {}).get(group) or COLOURS.get(group) or OTHERS[index % len(OTHERS)]
            axis.barh(places, [0.0 if value is None else value for value in values], height=high * 0.92, color=colour,
                      label=group)
        axis.set_yticks(np.arange(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        if not any(value for values in groups.values() for value in values):
            axis.set_xlim(0, 1)  # left to itself it would be around 0, with numbers below it
        axis.set_xlabel(x)
        axis.grid(True, axis='x')
        axis.tick_params(axis='y', length=0)
        if len(groups) > 1:  # inside it would lie over a bar
            axis.figure.legend(loc='outside lower center', ncols=len(groups), fontsize=10)
    return found[0]


def reliability(title: str, found: Mapping[str, Dict[str, Any]], names: Mapping[str, str]) -> str:
    """Reliability curves: how many were right, over the score.

    Args:
        title: above it.
        found: role -> of :func:`kd_mm.lab.report.calibration.reliability`.
        names: role -> name.
    """
    curves = [(names[role], COLOURS[role], [(x, y) for x, y in zip(entry['score'], entry['right']) if x is not None])
              for role, entry in found.items()]
    return lines(title, curves, 'score', 'share that is right', 0.0, 1.0, marks=True, diagonal=True)
