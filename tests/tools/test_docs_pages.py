"""What the site is made of: the generated pages have what the code and the cards have, and the look at links finds."""

import json
import re
from pathlib import Path

import pytest

from kd_mm.lab.commands.app import FORWARDED, OWN
from kd_mm.lab.recipes import recipes
from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import choices
from tools.dev import docs_links, docs_pages

ROOT = Path(__file__).resolve().parents[2]


def test_every_method_recipe_and_command_has_its_row():
    methods = docs_pages.methods_page()
    assert sorted(re.findall(r'^\| \[`(\w+Loss)`\]', methods, re.MULTILINE)) == choices(KDLoss)
    for page in (methods, docs_pages.cards_page()):
        for link in re.findall(r'\]\(\.\./\.\./(configs/[^)]+)\)', page):
            assert (ROOT / link).is_file(), link
    assert all(f'| `{recipe.name}` |' in docs_pages.recipes_page() for recipe in recipes())
    commands = docs_pages.commands_page()
    assert all(f'## `kd-mm {name}`' in commands for name in (*OWN, *FORWARDED))
    assert '--teacher-ckpt TEXT' in commands and 'usage: kd-mm check' in commands


@pytest.mark.parametrize('task, method, published, measured', [
    ('det', 'crosskd', '| GFL R101 to R50, 1x | 44.9 | 40.2 | 43.7 |',
     '- dense detector: 42.9 ± 0.4, plain student 36.2'),
    ('seg', 'cwd', '| PSPNet R101 to R18, 80k | 79.76 | 74.87 | 75.54 |',
     '- segmenter: 25.5 ± 0.0, plain student 21.6')])
def test_published_and_measured_stand_side_by_side(task, method, published, measured):
    card = (ROOT / 'configs' / task / method / 'README.md').read_text()
    page = docs_pages.section(docs_pages.published_page(task), card.split('\n')[0].lstrip('# '))
    assert published in card and published in page and measured in page
    assert measured.split(': ')[1].split(',')[0] in (ROOT / 'configs' / task / 'README.md').read_text()


def test_every_module_is_on_one_page():
    pages = docs_pages.api_pages()
    found = re.findall(r'automodule:: (\S+)', '\n'.join(pages.values()))
    assert sorted(found) == sorted(docs_pages.modules()) and 'kd_mm.losses.cwd' in found
    assert 'automodule:: kd_mm.losses.base.loss' in pages['api/kd_mm.losses.base.rst']
    assert not set(docs_pages.FORWARDERS) & set(found)


def test_a_reduction_is_no_type():
    lines = ['A loss.', '', 'Returns:', '    Reduction: per level; mean over cells', '    Parts: fg, bg', '    Summed.']
    docs_pages.spread_reductions(None, 'class', 'X', None, None, lines)
    assert lines[2:5] == ['Returns:', '    A scalar.', ''] and '    **Reduction:** per level; mean over cells' in lines
    assert [line.strip() for line in lines if line.strip()][-2:] == ['**Parts:** fg, bg', 'Summed.']
    lines = ['Directions: down, right.']
    docs_pages.spread_reductions(None, 'data', 'X', None, None, lines)
    assert lines == ['Directions – down, right.']
    lines = ['Train:', '', '    a \\', '        b']
    docs_pages.spread_reductions(None, 'module', 'kd_mm.lab.commands.train', None, None, lines)
    assert lines == ['::', '', '    Train:', '    ', '        a \\', '            b']


def test_the_notebook_as_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_pages, 'ROOT', tmp_path)
    cells = [dict(cell_type='markdown', source=['# Title\n', 'words']),
             dict(cell_type='code', source=['print(1)'], outputs=[dict(text=['1\n'])])]
    (tmp_path / 'tour.ipynb').write_text(json.dumps(dict(cells=cells)))
    page = docs_pages.notebook_page(tmp_path / 'tour.ipynb')
    assert page.startswith('# Title\nwords') and '```python\nprint(1)\n```\n\n```text\n1\n```' in page


def test_a_folder_without_configs_is_refused():
    with pytest.raises(ValueError, match='configs/det/nothing has no config'):
        docs_pages.first_config('det/nothing')


def test_commands_of_the_survey():
    config = 'configs/seg/cwd/cwd_pspnet_r18_from_r101_80k_cityscapes.py'
    text = '| a | `CWDLoss` | {train}`seg/cwd/cwd_pspnet_r18_from_r101_80k_cityscapes --amp`, `kd-mm methods` |'
    assert docs_pages.survey_commands(text) == [f'kd-mm train {config} --amp', 'kd-mm methods']


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'index.html').write_text(
        '<p id="a"><a href="#a"></a><a href="two.html#b"></a><a href="/x:y"></a>')
    (tmp_path / 'docs' / 'two.html').write_text(
        '<a id="b" href="index.html"></a><a href="index.html#c"></a><img src="lost.png"><a href="https://x.y/z"></a>')
    (tmp_path / 'docs' / 'three.html').write_text('<a href="two.html"></a>')
    found = docs_links.problems(tmp_path)
    assert [text.split(': ', 1)[1] for text in found] == [
        'no such file: /x:y', 'no such anchor: index.html#c', 'no such file: lost.png', 'no page leads to it']
