"""tools/studies/teacher_speed.py and against_mmrazor.py: what they measure exists, and a tiny run says its ratios."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools' / 'studies')]
import against_mmrazor  # noqa: E402
import teacher_speed  # noqa: E402


def test_every_pair_is_shipped():
    configs = [pair.config for pair in teacher_speed.PAIRS.values()] + [against_mmrazor.CONFIG]
    assert [config for config in configs if not (ROOT / 'configs' / config).is_file()] == []
    assert teacher_speed.scaled((800, 1344), 0.5) == (384, 672)  # multiples of 32


def test_a_tiny_pair(tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmdet')
    monkeypatch.setitem(teacher_speed.PAIRS, 'retinanet-r50', teacher_speed.Pair(
        'profile/retinanet_cwd.py', (128, 160)))
    out = tmp_path / 'out.json'
    assert teacher_speed.main(['--alone', '--pairs', 'retinanet-r50', '--size', 'half', '--forms', 'both', '--turns',
                               '2', '--steps', 'auto', 'bf16', '--json', str(out)]) == 0
    result, = json.loads(out.read_text())
    assert result['shape'] == [64, 96] or result['shape'] == [64, 64]
    assert set(result['ms']) == {'host', 'auto', 'both', 'bf16', 'peak', 'plain step', 'KD step', 'KD step, bf16'}
    assert set(result['ratios']) == {
        'auto', 'both', 'bf16', 'peak', 'step', 'implied', 'step, bf16', 'implied, bf16', 'teacher share'}
    for value in result['ratios'].values():
        assert 0 < value['low'] <= value['median'] <= value['high']
    assert '| retinanet-r50 | 2x64x' in teacher_speed.table([result])
    assert result['made']['command'] == ('python tools/studies/teacher_speed.py --pairs retinanet-r50 --size half '
                                         '--forms both bf16 --batch 2 --turns 2 --warmup 1 --clock wall --steps auto '
                                         'bf16')


def test_steps_are_compared_with_the_form_that_they_ran_in():
    found = dict(host=[4.0, 4.0], auto=[3.0, 3.0], bf16=[2.0, 2.0])
    found.update({'plain step': [6.0, 6.0], 'KD step': [9.5, 9.5], 'KD step, bf16': [8.5, 8.5]})
    ratios = {name: value['median'] for name, value in teacher_speed.ratios(found, ['auto', 'bf16']).items()}
    assert ratios == {'auto': 0.75, 'bf16': 0.5, 'step': 0.95, 'implied': 0.9, 'step, bf16': 0.85,
                      'implied, bf16': 0.8, 'teacher share': 0.4}
    assert set(teacher_speed.ratios(dict(host=[4.0], auto=[3.0]), [])) == {'auto'}


def test_the_peak_is_the_operations_of_the_host_at_the_rate_of_a_product(tmp_path, monkeypatch):
    """Each call takes one second of this clock, and the teacher needs half of the product's operations."""
    pytest.importorskip('mmdet')
    from kd_mm.lab import meters
    seconds = itertools.count()
    monkeypatch.setitem(teacher_speed.PAIRS, 'retinanet-r50', teacher_speed.Pair('profile/retinanet_cwd.py', (64, 96)))
    monkeypatch.setitem(teacher_speed.CLOCKS, 'wall', lambda: float(next(seconds)))
    monkeypatch.setattr(teacher_speed, 'EDGE', 64)
    monkeypatch.setattr(meters, 'count_flops', lambda call: 64**3)
    out = tmp_path / 'out.json'
    assert teacher_speed.main(['--alone', '--pairs', 'retinanet-r50', '--size', 'full', '--forms', '--no-steps',
                               '--turns', '2', '--json', str(out)]) == 0
    result, = json.loads(out.read_text())
    assert {name: times['median'] for name, times in result['ms'].items()} == dict(host=1000, auto=1000, peak=500)
    assert result['ratios']['peak']['median'] == 0.5


def test_quartiles_lie_between_what_was_measured():
    assert teacher_speed.quartiles([3.0, 1.0]) == dict(low=1.5, median=2.0, high=2.5)
    assert teacher_speed.quartiles([7.0]) == dict(low=7.0, median=7.0, high=7.0)


def test_what_was_measured_before_stays():
    def result(pair, host, **options):
        made = dict(machine=dict(processor=options.pop('processor', 'one')))
        return {**dict(pair=pair, batch=2, shape=[64, 96], threads=1, clock='cpu', host=host, made=made), **options}

    old = [result('b', 1), result('a', 2), result('a', 3, threads=2)]
    new = [result('a', 4), result('a', 5, shape=[128, 96]), result('b', 6, processor='two')]
    assert sorted(found['host'] for found in teacher_speed.together(old, new)) == [1, 3, 4, 5, 6]


@pytest.mark.skipif(importlib.util.find_spec('mmrazor') is not None, reason='MMRazor is installed')
def test_without_mmrazor_it_says_what_to_do():
    with pytest.raises(SystemExit, match='pip install --no-deps mmrazor==1.0.0'):
        against_mmrazor.main(['--turns', '1'])
