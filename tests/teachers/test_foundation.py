"""Backbones of timm as teachers: token maps, their own normalisation, files, and what they refuse."""

import fnmatch
import math
import re
from pathlib import Path

import pytest
import torch
from foundation import DINOV2, REGISTERS, TINY, require, tiny
from stock import detector, distill_hook, hook, make_runner, train

from kd_mm.teachers.foundation.maps import maps_of, prefix_tokens
from kd_mm.teachers.sources import build_teacher
from kd_mm.teachers.spec import TeacherSpec
from kd_mm.types.batch import KDBatch, Targets

timm = require('timm')
FIT = dict(loss_fit=dict(type='FitNetLoss', student_at='backbone', teacher_at='@backbone',
                         levels=dict(student=[3], teacher=[1])))


@pytest.fixture(scope='module')
def student(coco_root, tmp_path_factory):
    return make_runner(detector(coco_root, tmp_path_factory.mktemp('det'))).model


def spec_of(student, source, checkpoint='random', **more):
    return TeacherSpec(source, student, checkpoint, **more)


def test_maps_are_the_models_own_tokens_without_class_and_registers(student):
    teacher = build_teacher(spec_of(student, tiny(out_indices=(0, -1))))
    model = teacher.model.backbone.model
    assert prefix_tokens(model) == model.num_prefix_tokens == 5
    images = torch.rand(2, 3, 56, 84)
    first, last = teacher.model(images)
    assert first.shape == last.shape == (2, 32, 4, 6)
    tokens = model.forward_features(images)  # all of them, after the last norm
    assert torch.allclose(last, tokens[:, 5:].transpose(1, 2).reshape(2, 32, 4, 6), atol=1e-6)
    again, = maps_of([tokens], images, (14, 14), prefix_tokens(model), 'a ViT')
    assert torch.equal(again, last)
    with pytest.raises(ValueError, match='4x6 patches and 4 tokens before them .* are 28'):
        maps_of([tokens], images, (14, 14), 4, 'a ViT')


def test_pictures_are_those_of_its_own_transforms(student):
    """A BGR batch with the student's means, resized to the next multiple of 14, is what the data config asks for."""
    teacher = build_teacher(spec_of(student, tiny()))
    config = timm.data.resolve_model_data_config(teacher.model.backbone.model)
    picture = torch.randint(0, 256, (3, 64, 100), dtype=torch.uint8)
    sample = student.data_preprocessor(dict(inputs=[picture], data_samples=[]), False)
    inputs = sample['inputs']
    images, _ = teacher.prepare(inputs, (), KDBatch(Targets(input_shape=tuple(inputs.shape[-2:]))))
    assert images.shape[-2] % 14 == images.shape[-1] % 14 == 0 and images.shape[-2] - inputs.shape[-2] < 14
    wanted = inputs.new_tensor(config['mean']), inputs.new_tensor(config['std'])
    rgb = picture.flip(0).float()[None] / 255
    own = teacher.renormalise(inputs, KDBatch(Targets(img_shapes=[(64, 100)], input_shape=tuple(inputs.shape[-2:]))))
    expected = (rgb - wanted[0].view(3, 1, 1)) / wanted[1].view(3, 1, 1)
    assert torch.allclose(own[:, :, :64, :100], expected, atol=1e-5)
    assert torch.equal(images, torch.nn.functional.interpolate(own, images.shape[-2:], mode='bilinear'))


@pytest.mark.parametrize('speed', ['auto', dict(precision='bf16')], ids=['auto', 'bf16'])
def test_teaches_a_detector(coco_root, tmp_path, speed):
    runner, record = train(detector(coco_root, tmp_path), [hook(tiny(out_indices=(0, 1)), FIT, speed=speed)])
    distiller = distill_hook(runner).distiller
    assert all(math.isfinite(step['loss_fit']) and step['loss_fit'] > 0 for step in record.losses)
    assert ('student', 'loss_fit') in distiller.watch.proven
    comparison = distiller.terms['loss_fit']
    assert comparison.adapter is not None and not any('teacher' in key for key in runner.model.state_dict())
    assert distiller.teacher.fast.speed.precision == (None if speed == 'auto' else 'bf16')


def saved(tmp_path, model, suffix, **extra):
    state = {**{key: value.contiguous() for key, value in model.state_dict().items()}, **extra}
    path = tmp_path / f'own{suffix}'
    if suffix == '.safetensors':
        require('safetensors').torch.save_file(state, str(path))
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_of_a_file_fit_strictly(student, tmp_path, suffix):
    require('safetensors.torch')
    torch.manual_seed(5)
    model = timm.create_model(DINOV2, num_classes=0, **TINY)
    path = saved(tmp_path, model, suffix)
    source = dict(type='timm', name=DINOV2, options=dict(TINY))
    teacher = build_teacher(spec_of(student, source, path))
    images = torch.rand(1, 3, 56, 56)
    with torch.no_grad():
        wanted = timm.create_model(DINOV2, num_classes=0, dynamic_img_size=True, **TINY).eval()
        wanted.load_state_dict(model.state_dict())
        assert torch.equal(teacher.model(images)[0],
                           wanted.forward_intermediates(images, 1, norm=True, intermediates_only=True)[0])
    with pytest.raises(ValueError, match='leaves 14 of 48 keys unset'):
        build_teacher(spec_of(student, dict(type='timm', name=DINOV2, options=dict(TINY, depth=3)), path))


def test_the_authors_own_file_is_converted(student, tmp_path):
    """Registers under another name, a position for the class token: timm's own function converts them."""
    source = dict(tiny(), name=REGISTERS)
    model = timm.create_model(REGISTERS, num_classes=0, **TINY)
    state = dict(model.state_dict())
    positions = torch.cat([torch.ones(1, 1, 32), state.pop('pos_embed')], dim=1)
    registers = state.pop('reg_token')
    path = str(tmp_path / 'dinov2.pth')
    torch.save({**state, 'pos_embed': positions, 'register_tokens': registers, 'mask_token': torch.zeros(1, 32)}, path)
    teacher = build_teacher(spec_of(student, source, path))
    found = teacher.model.backbone.model
    assert any('converted by timm' in note for note in teacher.notes), teacher.notes
    assert torch.equal(found.reg_token, registers) and torch.equal(found.pos_embed, model.pos_embed)
    assert torch.equal(found.cls_token, state['cls_token'] + 1)


def test_a_classifier_is_left_out_with_a_word(student, tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', num_classes=7, **TINY)
    path = saved(tmp_path, model, '.pth')
    teacher = build_teacher(spec_of(student, dict(type='timm', name='vit_tiny_patch16_224', options=dict(TINY)), path))
    assert any('head as well, which a backbone does not have' in note for note in teacher.notes), teacher.notes
    assert torch.equal(teacher.model.backbone.model.pos_embed, model.pos_embed)
    assert teacher.view.multiple_of == (16, 16)


def test_a_pyramid_is_paired_by_stride(coco_root, tmp_path):
    source = dict(type='timm', name='resnet18', out_indices=(1, 2, 3, 4))
    losses = dict(loss_at=dict(type='ATLoss', student_at='neck', teacher_at='@backbone'))
    runner, record = train(detector(coco_root, tmp_path), [hook(source, losses)])
    term = distill_hook(runner).distiller.terms['loss_at']
    assert term.describe_levels() == 'levels by stride: student 0 with teacher 1, student 1 with teacher 2, ' \
        'student 2 with teacher 3'
    assert all(step['loss_at'] > 0 for step in record.losses)


@pytest.mark.parametrize('source, checkpoint, message', [
    (tiny(), None, r'kd_mm downloads nothing for it. Give teacher_ckpt=.path. of a file .* the published weights '
                   r'\(licence apache-2.0\)'),
    (tiny(), 'own', 'kd_mm downloads nothing'),
    (dict(type='timm', name='hf-hub:timm/vit'), 'random', 'names of a hub .* download weights'),
    (dict(type='timm', name='vit_smal_patch14_dinov2'), 'random', 'Closest: vit_small_patch14_dinov2'),
    (dict(type='timm', name=DINOV2, options=dict(depht=2)), 'random', 'cannot be built with options'),
    (tiny(out_indices=(5, )), 'random', r'out_indices=\[5\] and the model has 2 blocks'),
    (tiny(out_indices='last'), 'random', "out_indices='last' must be a list of blocks"),
    (tiny(depth=2), 'random', "timm has no argument 'depth'; it takes name, out_indices"),
    (tiny(preprocess=dict(men=[1, 2, 3])), 'random', "preprocess has no 'men'"),
])
def test_wrong_use_is_told(student, source, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(spec_of(student, source, checkpoint))


def test_no_timm_is_told(student, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'timm', None)
    with pytest.raises(ValueError, match='needs the package timm, which is not installed.*pip install timm'):
        build_teacher(spec_of(student, tiny()))


def test_the_licences_of_the_card_are_those_that_timm_names():
    card = (Path(__file__).resolve().parents[2] / 'configs' / 'det' / 'dsi' / 'README.md').read_text()
    assert f'as timm {timm.__version__} names it' in card
    table = card.split('| licence, as timm')[1].split('\n\n')[0]
    rows = re.findall(r'^\| (`[^|]+) \| ([\w.-]+) \|', table, re.MULTILINE)
    assert len(rows) == 7
    for patterns, licence in rows:
        for pattern in re.findall(r'`([^`]+)`', patterns):
            names = fnmatch.filter(timm.list_pretrained(), pattern)
            assert names and {timm.get_pretrained_cfg(name).license for name in names} == {licence}, pattern
