"""transformers, a local torch.hub repository and mmpretrain as teachers."""

import importlib.util
import json
import math

import pytest
import torch
from foundation import require
from stock import detector, distill_hook, hook, make_runner, train

from kd_mm.teachers.foundation.transformers_source import transformers_backbone
from kd_mm.teachers.sources import build_teacher
from kd_mm.teachers.spec import TeacherSpec

NORM = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
HUB = '''
import torch
from torch import nn


class Blocks(nn.Module):
    """The interface of the DINOv2 repository, with a class token and a register."""

    def __init__(self, width):
        super().__init__()
        self.patch_size = 14
        self.patch_embed = nn.Conv2d(3, width, 14, 14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.norm = nn.LayerNorm(width)

    def tokens(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([t.expand(len(x), -1, -1) for t in (self.cls_token, self.register_tokens)] + [x], 1)
        found = []
        for block in self.blocks:
            x = x + block(x)
            found.append(x)
        return found

    def forward(self, x):
        return self.norm(self.tokens(x)[-1])


class Dino(Blocks):
    def get_intermediate_layers(self, x, n=1, reshape=False, norm=True):
        chosen = self.tokens(x)
        chosen = chosen[-n:] if isinstance(n, int) else [chosen[i] for i in n]
        chosen = [self.norm(t)[:, 2:] if norm else t[:, 2:] for t in chosen]
        size = x.shape[-2] // 14, x.shape[-1] // 14
        return tuple(t.transpose(1, 2).unflatten(2, size) for t in chosen)


def plain(width=8):
    return Blocks(width)


def dino(pretrained=True, width=8):
    if pretrained:
        raise RuntimeError('this would download')
    return Dino(width)
'''


@pytest.fixture(scope='module')
def student(coco_root, tmp_path_factory):
    return make_runner(detector(coco_root, tmp_path_factory.mktemp('det'))).model


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp('repo')
    (folder / 'hubconf.py').write_text(HUB)
    return str(folder)


def build(student, checkpoint='random', **source):
    return build_teacher(TeacherSpec(source, student, checkpoint))


def fit(level):
    return dict(loss_fit=dict(type='FitNetLoss', student_at='backbone', teacher_at='@backbone',
                              levels=dict(student=[3], teacher=[level])))


# --------------------------------------------------------------- torch.hub


def test_a_hub_on_the_disk(student, repo, tmp_path):
    torch.manual_seed(3)
    teacher = build(student, type='torch.hub', repo=repo, name='dino', out_indices=(0, 2), preprocess=NORM)
    path = str(tmp_path / 'own.pth')
    torch.save({**teacher.model.backbone.model.state_dict(), 'mask_token': torch.zeros(1)}, path)
    again = build(student, path, type='torch.hub', repo=repo, name='dino', out_indices=(0, -1), preprocess=NORM)
    tokens = build(student, path, type='torch.hub', repo=repo, name='plain', preprocess=NORM)
    images = torch.rand(2, 3, 28, 42)
    first, last = teacher.model(images)
    assert first.shape == last.shape == (2, 8, 2, 3) and teacher.view.multiple_of == (14, 14)
    assert torch.equal(again.model(images)[1], last) and torch.equal(tokens.model(images)[0], last)


@pytest.mark.parametrize('source, checkpoint, message', [
    (dict(repo='facebookresearch/dinov2', name='dino'), 'random', 'no folder here with a hubconf.py'),
    (dict(name='dino'), None, 'kd_mm downloads nothing for it'),
    (dict(name='dino', preprocess=None), 'random', 'does not say how pictures are normalised'),
    (dict(name='dino', options=dict(pretrained=True)), 'random', 'pretrained=True downloads'),
    (dict(name='vit'), 'random', 'cannot be built from .*vit'),
    (dict(name='dino', out_indices=(3, )), 'random', r'out_indices=\[3\] and the model has 3 blocks')])
def test_wrong_hubs_are_told(student, repo, source, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        build(student, checkpoint, **{'type': 'torch.hub', 'repo': repo, 'preprocess': NORM, **source})


# --------------------------------------------------------------- transformers

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, image_size=56)


@pytest.fixture(scope='module')
def library():
    return require('transformers')


@pytest.fixture(scope='module')
def folder(library, tmp_path_factory):
    """What save_pretrained writes, and the file of the picture processor."""
    path = tmp_path_factory.mktemp('vits')
    torch.manual_seed(1)
    model = library.AutoModel.from_config(library.AutoConfig.for_model(
        'dinov2_with_registers', patch_size=14, num_register_tokens=4, **SIZES))
    model.save_pretrained(str(path))
    (path / 'preprocessor_config.json').write_text(json.dumps(dict(
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3)))
    return path


def test_a_folder_gives_model_weights_and_normalisation(library, student, folder):
    teacher = build(student, None, type='transformers', config=str(folder), out_indices=(0, -1))
    assert torch.allclose(teacher._to.mean.flatten(), torch.tensor([127.5, 102.0, 76.5])) and teacher._to.swapped
    images = torch.rand(2, 3, 56, 84)
    first, last = teacher.model(images)
    model = library.AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    with torch.no_grad():
        tokens = model(images).last_hidden_state
    assert first.shape == (2, 32, 4, 6)
    assert torch.allclose(last, tokens[:, 5:].transpose(1, 2).reshape(2, 32, 4, 6), atol=1e-5)
    file = str(folder / 'model.safetensors')
    named = build(student, file, type='transformers', config=str(folder))
    assert torch.equal(named.model(images)[0], last)


@pytest.mark.parametrize('kind, extra, grid', [
    ('vit', dict(patch_size=16), (4, 6)), ('clip_vision_model', dict(patch_size=16), (4, 6)),
    ('siglip_vision_model', dict(patch_size=16), (4, 6)), ('dinov3_vit', dict(patch_size=16), (4, 6)),
    ('swin', dict(embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=64), (8, 12))])
def test_models_with_and_without_a_backbone_class(library, student, kind, extra, grid):
    options = {**({} if kind == 'swin' else SIZES), **extra}
    teacher = build(student, type='transformers', config=dict(model_type=kind, **options), preprocess=NORM)
    level, = teacher.model(torch.rand(1, 3, 64, 96))
    assert tuple(level.shape[2:]) == grid


def test_it_teaches(library, coco_root, tmp_path, folder):
    source = dict(type='transformers', config=str(folder), out_indices=(1, 2))
    runner, record = train(detector(coco_root, tmp_path), [
        hook(source, fit(1), teacher_ckpt=None, speed=dict(precision='bf16'))])
    assert all(math.isfinite(step['loss_fit']) and step['loss_fit'] > 0 for step in record.losses)
    assert ('student', 'loss_fit') in distill_hook(runner).distiller.watch.proven


@pytest.mark.parametrize('source, message', [
    (dict(config='facebook/dinov2-small'), 'no folder and no file here .a name of a hub would be downloaded'),
    (dict(config=dict(hidden_size=32)), 'has a `model_type`'),
    (dict(config=dict(model_type='dinov5')), 'dinov5'),
    (dict(config=dict(model_type='dinov2', **SIZES)), 'no preprocessor_config.json'),
    (dict(config=dict(model_type='dinov2', **SIZES), out_indices=(3, ), preprocess=NORM), 'the model has 3 blocks')])
def test_wrong_configs_are_told(library, student, source, message):
    with pytest.raises(ValueError, match=message):
        build(student, **{'type': 'transformers', **source})


def test_without_weights_it_says_so(library, student):
    with pytest.raises(ValueError, match='kd_mm downloads nothing for it'):
        build(student, None, type='transformers', config=dict(model_type='dinov2', **SIZES), preprocess=NORM)


def test_another_file_is_refused(library, student, folder, tmp_path):
    torch.save(dict(state_dict={'layer.weight': torch.zeros(2)}), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='leaves 62 keys of the model unset'):
        build(student, str(tmp_path / 'other.pth'), type='transformers', config=str(folder))
    assert transformers_backbone.__doc__


# --------------------------------------------------------------- mmpretrain


def test_a_backbone_of_mmpretrain(student, tmp_path):
    require('mmpretrain')
    if importlib.util.find_spec('transformers') is not None:
        pytest.skip('mmpretrain 1.2.0 does not work beside transformers 5')
    config = dict(model=dict(
        type='ImageClassifier',
        backbone=dict(type='VisionTransformer', arch=dict(
            embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48), img_size=32, patch_size=16)),
        data_preprocessor=dict(mean=NORM['mean'], std=NORM['std'], to_rgb=True))
    teacher = build(student, type='mmpretrain', config=config, out_indices=(0, 1))
    first, last = teacher.model(torch.rand(1, 3, 32, 48))
    assert first.shape == last.shape == (1, 32, 2, 3) and teacher.same_input
    path = str(tmp_path / 'whole.pth')
    torch.save({f'backbone.{key}': value for key, value in teacher.model.backbone.model.state_dict().items()}, path)
    build(student, path, type='mmpretrain', config=config)


def test_without_mmpretrain_it_says_so(student, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'mmpretrain', None)
    with pytest.raises(ValueError, match='needs the package mmpretrain'):
        build(student, type='mmpretrain', config=dict(model=dict(type='A')))
