"""tools/studies/teacher_speed.py and against_mmrazor.py: what they measure exists, and a tiny run says its ratios."""

import importlib.util
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
                               '2', '--json', str(out)]) == 0
    result, = json.loads(out.read_text())
    assert result['shape'] == [64, 96] or result['shape'] == [64, 64]
    assert set(result['ms']) == {'host', 'auto', 'both', 'plain step', 'KD step'}
    assert set(result['ratios']) == {'auto', 'both', 'step', 'implied', 'teacher share'}
    for value in result['ratios'].values():
        assert 0 < value['low'] <= value['median'] <= value['high']
    assert '| retinanet-r50 | 2x64x' in teacher_speed.table([result])
    assert result['made']['command'] == ('python tools/studies/teacher_speed.py --pairs retinanet-r50 --size half '
                                         '--forms both --batch 2 --turns 2 --warmup 1 --clock wall')


def test_what_was_measured_before_stays():
    def result(pair, host, **options):
        return {**dict(pair=pair, batch=2, shape=[64, 96], threads=1, clock='cpu', host=host), **options}

    old = [result('b', 1), result('a', 2), result('a', 3, threads=2)]
    new = [result('a', 4), result('a', 5, shape=[128, 96])]
    assert sorted(found['host'] for found in teacher_speed.together(old, new)) == [1, 3, 4, 5]


@pytest.mark.skipif(importlib.util.find_spec('mmrazor') is not None, reason='MMRazor is installed')
def test_without_mmrazor_it_says_what_to_do():
    with pytest.raises(SystemExit, match='pip install --no-deps mmrazor==1.0.0'):
        against_mmrazor.main(['--turns', '1'])
