"""ARCHITECTURE.md and CONTRIBUTING.md against the code: paths, phases, marks; and no path of a machine."""

import importlib
import re
from pathlib import Path

import pytest

from kd_mm.engine import step

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ('ARCHITECTURE.md', 'CONTRIBUTING.md')}
#: Where a name in a table stands for a file of that folder.
FOLDERS = ('', 'kd_mm', *(f'kd_mm/{name}' for name in ('losses', 'losses/base', 'teachers', 'engine', 'hosts',
                                                       'hosts/heads', 'types', 'ops', 'lab', 'lab/report')))


@pytest.mark.parametrize('name', TEXTS)
def test_what_is_named_is_there(name):
    named = set(re.findall(r'`((?:[\w.]+/)*\w+\.py|(?:kd_mm|tools|tests)/[\w/]*/?)`', TEXTS[name]))
    named = {path for path in named if not re.search('NAME|TASK', path)}
    lost = [path for path in sorted(named) if not any((ROOT / folder / path).exists() for folder in FOLDERS)]
    assert lost == []
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', TEXTS[name]) if '://' not in link]
    assert all((ROOT / link).is_file() for link in links)


def written():
    """(file, its lines) of all that is written by hand, but for the history."""
    files = [path for folder in ('kd_mm', 'tools', 'tests', 'configs') for path in (ROOT / folder).rglob('*')
             if path.suffix in ('.py', '.md', '.sh', '.txt')]
    pages = [*(ROOT / 'docs').glob('*.md'), *(ROOT / 'docs').glob('*.py'), *(ROOT / 'docs').glob('*.ipynb')]
    for path in [*files, *pages, ROOT / 'Makefile', ROOT / 'pyproject.toml', *(ROOT / name for name in TEXTS),
                 ROOT / 'README.md']:
        yield path, path.read_text().splitlines()


def leads_somewhere(name):
    """Whether a dotted name is a module of kd_mm, or something in one."""
    parts = name.split('.')
    if parts[1] == 'configs':  # of an installation: the folder beside the package
        path = ROOT.joinpath(*parts[1:])
        return path.is_dir() or path.with_suffix('.py').is_file() or (parts[-1] == 'NAME' and path.parent.is_dir())
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
        if path.is_file():
            return count == len(parts) or hasattr(importlib.import_module('.'.join(parts[:count])), parts[count])
    return False


def test_no_name_of_a_file_or_module_is_stale():
    """Paths and dotted names in every docstring, comment and page: after a move the old ones must go."""
    lost = []
    for path, lines in written():
        for number, line in enumerate(lines, 1):
            paths = re.findall(r'(?<![\w/.{-])(?:kd_mm|tools|tests)/[\w./-]*\w', line)
            names = re.findall(r'(?<![\w/.{-])kd_mm\.[a-z]\w*(?:\.[A-Za-z_]\w*)*', line)
            lost += [f'{path.relative_to(ROOT)}:{number}: {name}' for name in (
                *(name for name in paths if not re.search('NAME|TASK|_$', name) and not any(
                    (ROOT / f'{name}{suffix}').exists() for suffix in ('', '.py'))),
                *(name for name in names if not leads_somewhere(name)))]
    assert lost == []


@pytest.mark.parametrize('name', TEXTS)
def test_no_path_of_a_machine(name):
    assert re.findall(r'(?<![\w.`\])])/(?:home|root|work|tmp|usr|opt|data)/', TEXTS[name]) == []


def test_the_order_of_a_step_is_the_codes():
    order = re.compile(r'^ +(\w+)   +\S', re.MULTILINE)
    phases = order.findall((step.__doc__ or '').split('::')[1].split('\n\n\n')[0].split('A teacher runs')[0])
    block = TEXTS['ARCHITECTURE.md'].split('## The order of a step')[1].split('```')[1]
    assert order.findall(block) == phases and len(phases) > 5
    assert all(hasattr(step.Step, phase) for phase in phases)


def test_facts_are_numbered_through():
    table = TEXTS['ARCHITECTURE.md'].split('## Facts of the host')[1].split('\n## ')[0]
    numbers = [int(number) for number in re.findall(r'^\| (\d+) \|', table, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers


def test_every_mark_is_explained():
    marks = re.findall(r'^\| `(\[\w+\])` \|', TEXTS['CONTRIBUTING.md'], re.MULTILINE)
    assert marks
    legend = (ROOT / 'kd_mm' / 'losses' / '__init__.py').read_text()
    assert re.findall(r'^- ``(\[\w+\])``', legend, re.MULTILINE) == marks
    sources = [path.read_text() for path in (ROOT / 'kd_mm').rglob('*.py')]
    used = {f'[{mark}]' for text in sources for mark in re.findall(r'[Dd]efault[^\n]{0,40} \[(\w+)[:\]]', text)}
    assert used <= set(marks)


def test_data_sets_and_samplers_of_the_hosts_are_listed():
    """``docs/data.md`` names all that the published hosts register; what it says was trained or read, a test does."""
    import mmdet.datasets
    import mmseg.datasets
    from mmdet.registry import DATA_SAMPLERS
    from mmdet.registry import DATASETS as DET
    from mmengine.registry import DATA_SAMPLERS as OWN
    from mmseg.registry import DATASETS as SEG
    if (mmdet.__version__, mmseg.__version__) != ('3.3.0', '1.2.2'):
        pytest.skip('the list is that of the published hosts')
    text = (ROOT / 'docs' / 'data.md').read_text()
    theirs = [name for registry in (DET, SEG, DATA_SAMPLERS, OWN) for name, found in registry.module_dict.items()
              if found.__module__.split('.')[0] in ('mmdet', 'mmseg', 'mmengine')]
    assert len(theirs) > 60 and [name for name in theirs if f'`{name}`' not in text] == []
    code = ''.join((ROOT / 'tests' / path).read_text() for path in (
        'engine/test_data.py', 'engine/test_data_seg.py', 'lab/test_layouts.py', 'helpers/layouts.py',
        'hosts/known/test_mmyolo_data.py', 'helpers/rotate.py'))
    rows = [line.split(' | ') for line in text.splitlines() if re.search(r'\| (trained|read)\b', line)]
    names = [re.findall(r'`(\w+)`', row[0]) for row in rows]
    assert len(rows) > 12 and all(not found or any(name in code for name in found) for found in names)
