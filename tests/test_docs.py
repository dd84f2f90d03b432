"""ARCHITECTURE.md and CONTRIBUTING.md against the code: paths, phases, marks; and no path of a machine."""

import re
from pathlib import Path

import pytest

from kd_mm.engine import step

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {name: (ROOT / name).read_text() for name in ('ARCHITECTURE.md', 'CONTRIBUTING.md')}
#: Where a name in a table stands for a file of that folder.
FOLDERS = ('', 'kd_mm', *(f'kd_mm/{name}' for name in ('losses', 'losses/base', 'teachers', 'engine', 'hosts',
                                                       'hosts/heads', 'types', 'ops', 'lab', 'cli')))


@pytest.mark.parametrize('name', TEXTS)
def test_what_is_named_is_there(name):
    named = set(re.findall(r'`((?:[\w.]+/)*\w+\.py|(?:kd_mm|tools|tests)/[\w/]*/?)`', TEXTS[name]))
    named = {path for path in named if not re.search('NAME|TASK', path)}
    lost = [path for path in sorted(named) if not any((ROOT / folder / path).exists() for folder in FOLDERS)]
    assert lost == []
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', TEXTS[name]) if '://' not in link]
    assert all((ROOT / link).is_file() for link in links)


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
