"""tools/list_taps.py: paths, shapes and calls are those that a tap finds."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from stock import NARROW_FCN, loss_step

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.models import build_student, scope_of
from kd_mm.lab.observe import observe, shape_text
from kd_mm.ops.problems import ConfigProblems

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


def test_places_and_what_hands_on(capsys):
    """The names that fit any model, with their paths in this one; a Dropout gives what it gets."""
    from kd_mm.lab.commands import taps
    model = torch.nn.Module()
    model.backbone = torch.nn.Conv2d(1, 1, 1)
    taps.print_places(model)
    assert capsys.readouterr().out.splitlines()[1:] == [
        'places:', '  @backbone  backbone', '  @neck      backbone', '  @output    the output']
    assert TOOL.main(DETECTOR) == 0
    text = capsys.readouterr().out
    assert text.endswith('  @logits    bbox_head.retina_cls\n') and '  @neck      neck\n' in text
    config = str(zoo_config('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'))
    small = [config, '--shape', '64', '64', '--cfg-options', 'model.pretrained=None']
    assert TOOL.main(small) == 0
    assert 'decode_head.dropout' not in rows(capsys.readouterr().out)
    assert TOOL.main([*small, '--all']) == 0
    assert rows(capsys.readouterr().out)['decode_head.dropout'][0] == 'Dropout2d'


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


class Foreign(torch.nn.Module):
    """A backbone of no host, as timm's with features_only: one module, several maps."""

    def __init__(self, width=6):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 3, 4, 1)
        self.deep = torch.nn.Conv2d(width, 2 * width, 3, 2, 1)

    @classmethod
    def from_name(cls, name):
        return cls(dict(small=4, large=8)[name])

    def forward(self, images):
        stem = self.stem(images)
        return [stem, self.deep(stem)]


def build_foreign(width):
    return Foreign(width)


FOREIGN = f'{__name__}.Foreign'


@pytest.fixture
def foreign(monkeypatch):
    """This file under the name by which a config would import it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__))
    for name, value in dict(Foreign=Foreign, build_foreign=build_foreign).items():
        monkeypatch.setattr(sys.modules[__name__], name, value, raising=False)


def teachers_config(folder, hook):
    (folder / 'teacher.py').write_text(NARROW_FCN)
    (folder / 'student.py').write_text(f"_base_ = './teacher.py'\ncustom_hooks = [{hook!r}]\n")
    return str(folder / 'student.py')


@pytest.mark.parametrize('teacher, path, shape', [
    ('teacher.py', 'decode_head', '1x19x8x8'),
    ('student', 'decode_head', '1x19x8x8'),
    ('self', 'decode_head', '1x19x8x8'),
    (dict(type='EMATeacher'), 'decode_head', '1x19x8x8'),
    (dict(type='PeerTeacher', config='teacher.py'), 'decode_head', '1x19x8x8'),
    (dict(type=FOREIGN, preprocess=dict(size=(32, 64))), '@output', '1x6x8x16, 1x12x4x8'),
    (dict(type=f'{FOREIGN}.from_name', name='large'), '@output', '1x8x16x16, 1x16x8x8'),
    (dict(type=f'{__name__}.build_foreign', width=5), 'stem', '1x5x16x16')])
def test_every_source_of_teachers(tmp_path, capsys, foreign, teacher, path, shape):
    hook = dict(type='kd_mm.DistillHook', teacher=teacher, teacher_ckpt='nowhere.pth', losses=dict())
    assert TOOL.main([teachers_config(tmp_path, hook), '--teacher', '--shape', '64', '64']) == 0
    assert rows(capsys.readouterr().out)[path][2] == shape


def test_one_of_several_teachers(tmp_path, capsys, foreign):
    teachers = dict(big=dict(teacher='teacher.py'), odd=dict(teacher=dict(type=FOREIGN)))
    config = teachers_config(tmp_path, dict(type='kd_mm.DistillHook', teachers=teachers, losses=dict()))
    words = ['--shape', '64', '64', '--teacher']
    assert TOOL.main([config, *words, 'odd']) == 0
    assert '@output' in rows(capsys.readouterr().out)
    assert TOOL.main([config, *words]) == 1
    assert 'there are several, say which one: big, odd' in capsys.readouterr().err
    assert TOOL.main([config, *words, 'small']) == 1
    assert '--teacher small: no teacher of that name; there are big, odd' in capsys.readouterr().err


@pytest.mark.parametrize('kind, said', [
    ('nobody_has_this.Model', "cannot be imported: No module named 'nobody_has_this'. Install the package"),
    (f'{FOREIGN}.from_names', "has no 'from_names'. Did you mean from_name"),
    (f'{__name__}.FOREIGN', 'is no class, function or method, but str'),
    (f'{__name__}.build_foreign', 'does not take')])
def test_a_wrong_name_says_what_is_there(tmp_path, capsys, foreign, kind, said):
    sys.modules[__name__].FOREIGN = FOREIGN
    hook = dict(type='kd_mm.DistillHook', teacher=dict(type=kind), teacher_ckpt='own', losses=dict())
    assert TOOL.main([teachers_config(tmp_path, hook), '--teacher']) == 1
    assert said in capsys.readouterr().err


def test_the_whole_output_of_a_foreign_model_teaches(foreign):
    """`teacher_at='@output'`, with weights that the factory has loaded itself."""
    cfg = Config.fromfile(str(zoo_config('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py')))
    cfg.merge_from_dict(dict(model=dict(pretrained=None, backbone=dict(depth=18, base_channels=8, stem_channels=8,
                                                                       norm_cfg=dict(type='BN')))))
    cfg.model.decode_head.update(in_channels=64, channels=16, norm_cfg=dict(type='BN'))
    cfg.model.auxiliary_head = None
    with scope_of(cfg):
        student = build_student(cfg)
        kd = Distiller(student, dict(type=f'{FOREIGN}.from_name', name='small'), dict(loss_a=dict(
            type='FitNetLoss', student_at='backbone', teacher_at='@output', levels=dict(student=[0, 1], teacher=[0, 1])
        )), teacher_ckpt='own', scope='mmseg')
        assert loss_step(student, kd)['loss_a'] > 0
        with pytest.raises(ConfigProblems, match="'@output' is what a model of no host returns; EncoderDecoder"):
            Distiller(student, dict(type=FOREIGN), dict(loss_a=dict(type='FitNetLoss', at='@output')),
                      teacher_ckpt='own', scope='mmseg')
