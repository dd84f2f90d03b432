"""`make gpu`: its CPU part runs as shipped, and a check that fails is told and stops no other."""

import json

import pytest
import torch
from stock import tool

gpu_check = tool('gpu_check')


def test_the_part_that_needs_no_gpu(tmp_path, capsys):
    names = [name for name in gpu_check.CHECKS if name not in ('memory', 'fast_teacher')]  # tests/lab, tests/engine
    assert gpu_check.main(['--cpu', '--out', str(tmp_path), '--only', *names]) == 0
    assert 'no number is that of a GPU' in capsys.readouterr().out
    report = json.loads((tmp_path / 'gpu_check.json').read_text())
    found = {result['name']: result for result in report['checks']}
    assert list(found) == names and not report['cuda']
    assert {name for name, result in found.items() if result['status'] == 'skipped'} == {
        'amp_fp16', 'amp_bf16', 'stream', 'compiled', 'ddp'}
    assert all(result['why'] for result in found.values() if result['status'] == 'skipped')
    assert found['weight_zero']['numbers']['difference'] == 0 == found['cut_and_resumed']['numbers']['difference']
    assert found['costs']['numbers'][gpu_check.DETECTOR]['ratio'] > 0
    text = (tmp_path / 'gpu_check.md').read_text()
    assert text.startswith('# cpu') and text.count('| passed |') == 5
    assert f'| {gpu_check.DETECTOR} | 2 of 64x64 |' in text
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]  # the runs are gone


def test_a_failure_is_told_and_stops_nothing(tmp_path, monkeypatch):
    def broken(place):
        raise RuntimeError('no kernel image\nis available')

    monkeypatch.setitem(gpu_check.CHECKS, 'stream', broken)
    assert gpu_check.main(['--cpu', '--out', str(tmp_path), '--only', 'stream', 'ddp']) == 1
    found = json.loads((tmp_path / 'gpu_check.json').read_text())['checks']
    assert [result['status'] for result in found] == ['failed', 'skipped'] and 'no kernel image' in found[0]['why']
    assert '| failed |' in (tmp_path / 'gpu_check.md').read_text()


def test_operators_that_are_missing_and_what_stands_in():
    import gpu_ops
    from mmdet.models.losses import focal_loss
    kept = focal_loss.sigmoid_focal_loss
    assert set(gpu_ops.FALLBACKS) <= set(gpu_ops.CALLS)
    assert all(gpu_ops.missing_ops('cpu').values()) and 'nms' not in gpu_ops.missing_ops('cpu')
    pred, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 3, 0])
    expected = focal_loss.FocalLoss(reduction='none')(pred, target)  # on a CPU mmdet takes its own formula
    with gpu_ops.fallbacks(dict(sigmoid_focal_loss='not compiled')) as used:
        assert used == ['sigmoid_focal_loss']
        torch.testing.assert_close(focal_loss.sigmoid_focal_loss(pred, target, reduction='none'), expected)
    assert focal_loss.sigmoid_focal_loss is kept


def test_two_runs_that_differ_are_no_equals():
    import gpu_place
    first, second = gpu_place.Losses(), gpu_place.Losses()
    first.steps, second.steps = [dict(loss_cls=1.0, acc=3.0)], [dict(loss_cls=1.01, acc=9.0)]
    assert gpu_check.close(first, second, 0.02) == pytest.approx(0.01)
    with pytest.raises(AssertionError, match='differ by 0.01'):
        gpu_check.close(first, second, 0.001)
