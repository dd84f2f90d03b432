"""What Sphinx does not look at: every link of the built pages leads somewhere, and every page can be reached.

``docs/conf.py`` calls :func:`setup`.  Links to other servers are not followed.
"""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple
from urllib.parse import unquote, urlparse

#: Pages that Sphinx makes and links to from its own scripts.
OWN = {'genindex.html', 'py-modindex.html', 'search.html', 'index.html'}
FRONT = 'docs/index.html'
REDIRECT = f"""<!doctype html>
<meta charset="utf-8"><title>kd_mm</title><meta http-equiv="refresh" content="0; url={FRONT}">
<a href="{FRONT}">kd_mm</a>
"""


class Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: Set[str] = set()
        self.links: List[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        for name, value in attrs:
            if name == 'id' and value:
                self.anchors.add(value)
            elif name in ('href', 'src') and value:
                self.links.append(value)


def problems(root: Path, front: str = FRONT) -> List[str]:
    """Links of the pages below a folder that lead nowhere, and pages that no path of links from the front reaches."""
    root = root.resolve()
    pages = {path: Page(path.read_text(encoding='utf-8')) for path in sorted(root.rglob('*.html'))}
    found: List[str] = []
    leads: Dict[Path, Set[Path]] = {path: set() for path in pages}
    for path, page in pages.items():
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists():
                found.append(f'{path.relative_to(root)}: no such file: {link}')
            elif target in pages:
                leads[path].add(target)
                if anchor and anchor not in pages[target].anchors:
                    found.append(f'{path.relative_to(root)}: no such anchor: {link}')
    reached, new = set(), {root / front}
    while new:
        reached |= new
        new = {target for path in new for target in leads.get(path, ())} - reached
    found += [f'{path.relative_to(root)}: no page leads to it' for path in pages
              if path not in reached and path.relative_to(root).as_posix() not in OWN]
    return found


def setup(app: Any) -> None:
    """Connect to Sphinx: a page at the top that leads to the front, and the check after the build."""
    from sphinx.errors import SphinxError

    def check(app: Any, exception: Optional[Exception]) -> None:
        if exception is None and app.builder.name == 'html':
            (Path(app.outdir) / 'index.html').write_text(REDIRECT, encoding='utf-8')
            found = problems(Path(app.outdir))
            if found:
                raise SphinxError('\n'.join(['links that lead nowhere:', *found]))

    app.connect('build-finished', check)
