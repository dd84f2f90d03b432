"""tools/list_taps.py: paths, shapes and calls are those that a tap finds."""

import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from stock import NARROW_FCN

from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.models import build_student, scope_of
from kd_mm.lab.observe import observe, shape_text

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SPEC = importlib.util.spec_from_file_location('kd_mm_tool_list_taps', TOOLS / 'list_taps.py')
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)

SMALL = ['model.backbone.base_channels=8', 'model.backbone.stem_channels=8', 'model.backbone.init_cfg=None',
         'model.neck.in_channels=[8,16,32,64]', 'model.neck.out_channels=16', 'model.bbox_head.in_channels=16',
         'model.bbox_head.feat_channels=16', 'model.bbox_head.num_classes=2']
DETECTOR = ['mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', '--shape', '64', '96', '--cfg-options', *SMALL]


def rows(text):
    """path -> (type, calls, shapes) of a printed table."""
    lines = [line.split(None, 3) for line in text.splitlines()]
    return {line[0]: (line[1], int(line[2]), line[3]) for line in lines[1:] if len(line) == 4 and line[2].isdigit()}


def test_shapes_and_calls_of_the_neck(capsys):
    assert TOOL.main([*DETECTOR, '--filter', 'neck']) == 0
    table = rows(capsys.readouterr().out)
    assert table['neck'] == ('FPN', 1, '1x16x8x12, 1x16x4x6, 1x16x2x3, 1x16x1x2, 1x16x1x1')
    assert table['neck.fpn_convs.3.conv'] == ('Conv2d', 1, '1x16x1x2')
    assert not any(path.startswith('backbone.') for path in table)


def test_a_shared_head_is_called_once_a_level(capsys):
    assert TOOL.main([*DETECTOR, '--filter', 'bbox_head.retina_???']) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ['bbox_head.retina_cls', 'bbox_head.retina_reg']  # model order
    assert table['bbox_head.retina_cls'][1:] == (5, '1x18x8x12, 1x18x4x6, 1x18x2x3, 1x18x1x2, 1x18x1x1')


def test_modules_that_return_nothing_are_listed_on_demand(capsys):
    assert TOOL.main([*DETECTOR, '--filter', 'loss_cls']) == 0
    text = capsys.readouterr().out
    assert '1 more were not called' in text and not rows(text)
    assert TOOL.main([*DETECTOR, '--filter', 'loss_cls', '--all']) == 0
    assert rows(capsys.readouterr().out)['bbox_head.loss_cls'] == ('FocalLoss', 0, '-')
    assert TOOL.main([*DETECTOR, '--filter', 'nowhere']) == 1


def test_auxiliary_heads_and_the_teacher(tmp_path, capsys):
    (tmp_path / 'teacher.py').write_text(NARROW_FCN)
    (tmp_path / 'student.py').write_text('''
_base_ = './teacher.py'
model = dict(decode_head=dict(channels=8))
custom_hooks = [dict(type='kd_mm.DistillHook', teacher='{{ fileDirname }}/teacher.py', losses=dict())]
''')
    run = [str(tmp_path / 'student.py'), '--shape', '64', '64', '--filter', '*_head*']
    shapes = []
    for more in ([], ['--teacher']):
        assert TOOL.main([*run, *more]) == 0
        table = rows(capsys.readouterr().out)
        assert table['decode_head'] == ('FCNHead', 1, '1x19x8x8')  # its host calls .forward() past every hook
        assert table['auxiliary_head.conv_seg'] == ('Conv2d', 1, '1x19x8x8')
        shapes.append(table['decode_head.convs.1'][2])
    assert shapes == ['1x8x8x8', '1x16x8x8']
    assert TOOL.main([str(tmp_path / 'teacher.py'), '--teacher']) == 1
    assert 'no kd_mm.DistillHook' in capsys.readouterr().err


@pytest.fixture(scope='module')
def segformer():
    cfg = Config.fromfile(str(zoo_config(
        'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py')))
    cfg.model.backbone.update(init_cfg=None, embed_dims=8, num_heads=[1, 2, 5, 8], num_layers=[1, 1, 1, 1])
    cfg.model.decode_head.update(in_channels=[8, 16, 40, 64], channels=16, norm_cfg=dict(type='BN'))
    with scope_of(cfg):
        return build_student(cfg)


def test_tokens_are_shown_as_the_maps_that_a_tap_gives(segformer):
    flags = {name: module.training for name, module in segformer.named_modules()}
    state = torch.get_rng_state()
    found = {row.path: row for row in observe(segformer, (64, 96))}
    assert torch.equal(state, torch.get_rng_state())
    assert flags == {name: module.training for name, module in segformer.named_modules()}
    assert not any('forward' in vars(module) for module in segformer.modules())
    path = 'backbone.layers.1.1.0'
    assert found[path].shapes == [(1, 16, 8, 12)]
    tap = Tap(segformer, path)
    with torch.no_grad():
        tap.arm((64, 96))
        forward_tensor(segformer.eval(), torch.zeros(1, 3, 64, 96), None)
    assert [tuple(tensor.shape) for tensor in tap.read()] == found[path].shapes


def test_long_lists_of_shapes_are_cut():
    assert shape_text([(1, 2), (1, 2), (3, )]) == '2 times 1x2, 3'
    text = shape_text([(1, index) for index in range(20)])
    assert text.endswith('1x7, ... (20 in all)')
