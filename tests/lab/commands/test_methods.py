"""``kd-mm methods``: what is said of a loss is what the loss is, and the ranks are those of the tables."""

import json
import re
from pathlib import Path

import pytest
from pairs import kd_mm, message

from kd_mm.lab.commands import methods
from kd_mm.losses.base.loss import KDLoss
from kd_mm.registry import MODELS, choices

ROOT = Path(__file__).resolve().parents[3]


def listed(*words):
    return re.findall(r'^(\w+Loss)\b', kd_mm('methods', *words).output, re.MULTILINE)


def test_all_are_listed():
    assert listed() == listed('--long') == sorted(choices(KDLoss), key=str.lower)


def test_of_many_there_is_a_line_each():
    text = kd_mm('methods').output
    assert len(text.splitlines()) == len(choices(KDLoss)) + 3  # a head, an empty line, the sum
    assert max(map(len, text.splitlines())) <= 120 and text.endswith('More about one: kd-mm methods NAME\n')
    row = next(line for line in text.splitlines() if line.startswith('FGDLoss'))
    assert re.fullmatch(r'FGDLoss +features +boxes +\d+ of \d+ .*', row)
    assert 'CVPR 2022' in kd_mm('methods', '--long').output and 'CVPR 2022' not in text


def test_filters():
    assert 'SoftmaxKDLoss' in listed('--compares', 'logits') and 'FGDLoss' not in listed('--compares', 'logits')
    assert sorted(name for kind in methods.KINDS for name in listed('--compares', kind)) == sorted(choices(KDLoss))
    assert 'LDLoss' in listed('--task', 'detection') and 'LDLoss' not in listed('--task', 'segmentation')
    assert 'FGDLoss' not in listed('--no-needs') and 'PKDLoss' in listed('--no-needs')
    assert listed('receptive') == ['MasKDLoss']
    assert 'FGDLoss' in listed('--needs', 'Boxes') and 'PKDLoss' not in listed('--needs', 'boxes')
    assert listed('--needs', 'first stage') and not set(listed('--needs', 'first stage')) & set(listed('--no-needs'))
    nothing = kd_mm('methods', 'nothing at all')
    assert nothing.exit_code == 1 and 'no loss is like that' in message(nothing)
    assert kd_mm('methods', 'receptive').output.endswith('\n1 loss\n')


@pytest.mark.parametrize('name, expected', [
    ('FGDLoss', ['boxes']), ('BPKDLoss', ['label maps']), ('PKDLoss', []),
    ('MasKDLoss', ['a first stage (tools/learn_tokens.py)']), ('SKDHolisticLoss', ['a network of its own'])])
def test_what_is_needed(name, expected):
    choices(KDLoss)
    assert methods.needs(MODELS.module_dict[name]) == expected


def test_ranks_are_those_of_the_tables():
    text = (ROOT / 'configs' / 'det' / 'README.md').read_text().split('## GFL')[1].split('\n## ')[0]
    rows = re.findall(r'^\| `(\w+)` \|', text, re.MULTILINE)
    ranks = methods.ranks()
    for name in (rows[0], rows[1], rows[-1]):
        found = ranks[name]['dense detector']
        assert str(found).startswith(f'{rows.index(name) + 1} of {len(rows)}, ')
        cost = re.search(rf'^\| `{name}` .*\((\d\.\d\d)x\) \| [\d.]+ \|', text, re.MULTILINE).group(1)
        assert f'{cost} times the plain step' in str(found)


def test_filters_by_rank_and_cost():
    known = {row.loss: row for row in methods.rows()}
    for task in ('detection', 'segmentation'):
        best = listed('--rank', 2, '--task', task)
        assert [known[name].best(task) for name in best] == sorted(known[name].best(task) for name in best)
        assert {known[name].best(task) for name in best} == {1, 2}
        cheap = listed('--cost', 1.5, '--task', task)
        assert cheap and all((place.cost or 1) <= 1.5 for name in cheap for place in known[name].of_task(task))
        assert all(any(place.cost for place in known[name].of_task(task)) for name in cheap)
        dear = set(listed('--task', task)) - set(cheap)
        assert any(place.cost and place.cost > 1.5 for name in dear for place in known[name].of_task(task))
    assert kd_mm('methods', '--rank', 0).exit_code == 2


def test_without_a_checkout_there_are_no_ranks(monkeypatch):
    monkeypatch.setattr(methods, 'configs_folder', lambda: None)
    text = kd_mm('methods', 'PKDLoss').output
    assert 'not in our tables' in text and 'detection, segmentation' in text
    assert 'leave --rank and --cost out' in message(kd_mm('methods', '--rank', 3))


def test_ranks_are_among_single_methods(tmp_path, monkeypatch):
    """Measured weights, combinations and plain students that were trained longer take no place."""
    scores = {'teacher': 9, 'plain': 1, 'plain:x2': 8, 'pkd:auto': 7, 'pkd+ld': 6, ':scratch': 5, 'pkd': 4, 'cwd': 3}
    (tmp_path / 'det').mkdir()
    (tmp_path / 'det' / 'benchmark.json').write_text(json.dumps(dict(pairs=dict(lite_gfl=dict(
        runs={name: {'0': dict(score=score)} for name, score in scores.items()})))))
    monkeypatch.setattr(methods, 'configs_folder', lambda: tmp_path)
    assert methods.ranks() == {name: {'dense detector, pretrained': methods.Place(place, 2)}
                               for place, name in enumerate(('pkd', 'cwd'), 1)}
