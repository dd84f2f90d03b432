"""tools/learn_tokens.py as a user types it, on stock data sets written by the tests."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from stock import detector, hook, segmentor, teacher_of

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))
SPEC = importlib.util.spec_from_file_location('kd_mm_tool_learn_tokens', TOOLS / 'learn_tokens.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)


def write(tmp_path, cfg, at, kind='MasKDLoss', **losses):
    cfg.custom_hooks = [hook(teacher_of(cfg), dict(
        loss_learned=dict(type=kind, at=at, tokens=str(tmp_path / 'tokens.pth'), num_tokens=2), **losses))]
    cfg.visualizer.name = f'test_{tmp_path.name}'
    path = tmp_path / 'config.py'
    cfg.dump(str(path))
    return str(path)


def test_segmentation_both_stages_by_one_command(tmp_path, cityscapes_root, capsys):
    path = write(
        tmp_path, segmentor(cityscapes_root, tmp_path / 'work', steps=1), 'decode_head.conv_seg',
        loss_learned_aux=dict(type='MasKDLoss', at='auxiliary_head.conv_seg', tokens=str(tmp_path / 'tokens.pth'),
                      num_tokens=2))
    TOOL.main([path, '--iters', '2', '--device', 'cpu', '--train'])
    text = capsys.readouterr().out
    assert 'task' in text and 'loss_learned' in text and 'wrote' in text
    saved = torch.load(tmp_path / 'tokens.pth', weights_only=True)
    assert saved['loss'] == 'MasKDLoss' and saved['state_dict']['levels.0.tokens'].shape == (2, 19)
    extras = torch.load(tmp_path / 'work' / 'iter_1.pth', weights_only=False)['kd_mm']['state_dict']
    for name in ('loss_learned', 'loss_learned_aux'):  # the second shares the file of the first
        assert torch.equal(extras[f'{name}.loss.finder.levels.0.tokens'], saved['state_dict']['levels.0.tokens'])
    with pytest.raises(SystemExit, match='is there already.*--overwrite'):
        TOOL.main([path, '--iters', '1', '--device', 'cpu'])


@pytest.mark.parametrize('kind', ['MasKDLoss', 'FreeKDLoss'])
def test_detection(tmp_path, coco_root, kind):
    path = write(tmp_path, detector(coco_root, tmp_path / 'work', steps=1), 'neck', kind)
    TOOL.main([path, '--iters', '1', '--device', 'cpu', '--out', str(tmp_path / 'out')])
    saved = torch.load(tmp_path / 'out' / 'loss_learned.pth', weights_only=True)
    assert saved['loss'] == kind and len([key for key in saved['state_dict'] if 'tokens' in key]) == 5
    assert not (tmp_path / 'tokens.pth').exists()


def test_mistakes_are_messages(tmp_path, cityscapes_root):
    cfg = segmentor(cityscapes_root, tmp_path / 'work', steps=1)
    cfg.custom_hooks = [hook(teacher_of(cfg), dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg')))]
    path = tmp_path / 'config.py'
    cfg.dump(str(path))
    with pytest.raises(SystemExit, match='no loss of this config learns'):
        TOOL.main([str(path), '--device', 'cpu'])
    path.write_text(path.read_text().replace('kd_mm.DistillHook', 'EMAHook'))
    with pytest.raises(SystemExit, match='no kd_mm.DistillHook'):
        TOOL.main([str(path), '--device', 'cpu'])
    with pytest.raises(SystemExit):
        TOOL.main([str(path), '--train', '--out', 'x'])
