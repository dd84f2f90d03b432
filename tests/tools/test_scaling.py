"""Expected cost on many GPUs: the formula by hand, and what a profile must hold for it."""

import argparse
import json

import pytest
from stock import TOOLS, tool

scaling = tool('scaling')
PROFILE = dict(config='x.py', batch=2, input_shape=[800, 1344], device='a card', plain_step_ms=100.0, kd_step_ms=150.0,
               plain_parts_ms=dict(forward=30.0, backward=60.0, optimizer=10.0),
               gradient_bytes=dict(student=800e6, extras=8e6))


def test_by_hand():
    args = scaling.parse_args(['-', '--inner', '100', '--outer', '10', '--latency', '0', '--hidden', '0.5'])
    one = scaling.expected(PROFILE, 8, args)  # 2 * 7/8 * 8 ms, all of it beside half of the backward pass
    assert one['student_message'] == pytest.approx(14) and one['student_shown'] == 0
    assert one['extras_message'] == pytest.approx(0.14) and one['kd'] == pytest.approx(150.14)
    two = scaling.expected(PROFILE, 16, args)  # and 2 * 1/2 * 80 ms between two nodes
    assert two['student_message'] == pytest.approx(94) and two['student_shown'] == pytest.approx(64)
    assert two['plain'] == pytest.approx(164) and two['ratio'] == pytest.approx((150 + 64 + 0.94) / 164)
    assert scaling.expected(dict(PROFILE, gradient_bytes=dict(student=1, extras=0)), 64, args)['extras_message'] == 0


def test_the_table_of_a_measured_profile(tmp_path, capsys):
    config = str(TOOLS.parent / 'configs' / 'profile' / 'retinanet_cwd.py')
    options = ['--shape', '64', '64', '--steps', '1', '--json', str(tmp_path / 'a.json')]
    assert tool('measure').main([config, *options]) == 0
    capsys.readouterr()
    kept = tmp_path / 'kept.json'
    assert scaling.main([str(tmp_path / 'a.json'), '--faster', '30', '--record', str(kept)]) == 0
    text = capsys.readouterr().out
    found = json.loads(kept.read_text())
    assert scaling.table(found['results'], argparse.Namespace(**found['options'])) == text
    assert found['made']['command'] == f'kd-mm profile {config} --batch 2 --shape 64 64 --steps 1 --json FILE'
    assert text.startswith('**Computed, not measured**') and 'cpu divided by 30 (assumed)' in text
    assert [line.split('|')[1].strip() for line in text.splitlines() if line.startswith('| ')][1:] == [
        '8', '16', '32', '64']


def test_files_and_numbers_that_do_not_do(tmp_path, capsys):
    old = {key: value for key, value in PROFILE.items() if key != 'gradient_bytes'}
    (tmp_path / 'old.json').write_text(json.dumps(old))
    (tmp_path / 'new.json').write_text(json.dumps(PROFILE))
    assert scaling.main([str(tmp_path / 'none.json')]) == 1
    assert scaling.main([str(tmp_path / 'new.json'), '--gpus', '12']) == 1
    assert 'no whole number of nodes' in capsys.readouterr().err
    assert scaling.main([str(tmp_path / 'old.json')]) == 1 and 'write it anew' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        scaling.parse_args(['x', '--inner', '0'])
