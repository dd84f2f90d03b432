"""Recipes: chosen by what both models are and by our tables, tried before they are taken, explained."""

import re
from pathlib import Path

import pytest
from detrs import detr_config
from heads import head_config
from stock import segmentor
from two_stage import two_stage_config

from kd_mm.hosts.models import build_model, load_config
from kd_mm.lab import recipes as lab
from kd_mm.lab.recipes import CNN_SEGMENTER, DENSE, DETR, ORDER, TWO_STAGE, Recipe, choose, facts, recipes, register
from kd_mm.registry import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def model(cfg):
    return build_model(load_config(cfg)[0], None)


def gfl(feat=32):
    cfg = head_config('gfl')
    cfg.merge_from_dict(dict(model=dict(bbox_head=dict(feat_channels=feat))))
    return model(cfg)


@pytest.fixture(scope='module')
def pair():
    return gfl(), gfl(feat=64)


def test_the_best_of_the_table_for_two_equal_heads(pair):
    choice = choose(pair[0], gfl())
    assert choice.recipe.name == 'crosskd' and choice.losses == dict(loss_crosskd=dict(type='CrossKDLoss',
                                                                                      at='bbox_head'))
    assert choice.steps[0] == ('student: dense detector with GFLHead, levels of strides 8, 16, 32, 64, 128 with 32 '
                               'channels')
    assert choice.steps[-1].startswith('crosskd: chosen; 42.9 against 36.2 of the plain student')


def test_heads_that_differ_take_the_next_one(pair):
    """And one that is asked for by name is refused with the next best that fits."""
    choice = choose(*pair)
    assert choice.recipe.name == 'mimic'
    assert any('crosskd: does not fit: ' in step and 'feat_channels' in step for step in choice.steps)
    assert choice.steps[2] == 'both have levels of strides 8, 16, 32, 64, 128 (32 channels); heads of one kind'
    with pytest.raises(ValueError, match=r"'crosskd' does not fit this pair: .*Take --recipe mimic, which fits"):
        choose(*pair, name='crosskd')


def test_two_stage(tmp_path):
    choice = choose(model(two_stage_config('faster')), model(two_stage_config('faster', width=24)))
    assert choice.recipe.name == 'defeat'
    assert choice.losses['loss_defeat']['foreground']['strides'] == [4, 8, 16, 32]


def test_segmenters(tmp_path):
    student, teacher = (model(segmentor(tmp_path, tmp_path, base=base)) for base in (8, 12))
    assert facts(student).kind == CNN_SEGMENTER and choose(student, teacher).recipe.name == 'reviewkd'
    with pytest.raises(ValueError, match=r"'pkd' is for detection, and these models do segmentation. Choices: auto, "
                                         'reviewkd, cwd'):
        choose(student, teacher, name='pkd')
    with pytest.raises(ValueError, match='the student does segmentation and the teacher detection'):
        choose(student, gfl())
    with pytest.raises(KeyError, match="unknown recipe 'fgd2'. Choices: auto, crosskd"):
        choose(student, teacher, name='fgd2')


def test_what_was_not_measured_falls_back_and_says_so():
    cfg = detr_config('deformable')
    choice = choose(model(cfg), model(cfg))
    assert choice.recipe.name == 'pkd' and choice.losses['loss_pkd']['at'] == '@neck'
    assert f'we have measured nothing for a {DETR}, so this falls back to features at the neck' in choice.steps
    assert choice.steps[-1] == f'pkd: chosen; not measured by us for a {DETR}'


def test_a_transformer_segmenter_falls_back_to_logits(tmp_path):
    cfg = load_config('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py')[0]
    cfg.merge_from_dict(dict(model=dict(backbone=dict(embed_dims=8, num_heads=[1, 1, 1, 1]), decode_head=dict(
        in_channels=[8, 8, 8, 8], channels=16, norm_cfg=dict(type='BN')))))
    found = model(cfg)
    choice = choose(found, model(cfg))
    assert facts(found).kind == lab.TRANSFORMER_SEGMENTER and choice.recipe.name == 'cwd'
    assert any('falls back to the class logits' in step for step in choice.steps)


def test_every_number_is_that_of_the_table():
    for recipe in recipes():
        folder = 'det' if recipe.task == 'detection' else 'seg'
        for kind, (row, score, plain, spread) in recipe.evidence.items():
            text = (ROOT / 'configs' / folder / 'README.md').read_text()
            title = {DENSE: '## GFL', TWO_STAGE: '## Faster R-CNN', CNN_SEGMENTER: '## PSPNet'}[kind]
            table = text.split(title)[1].split('\n## ')[0]
            own, others = spread.split(' and ')
            assert re.search(rf'^\| `{row}` \| {score} ± {own} \|', table, re.MULTILINE), recipe.name
            assert re.search(rf'^\| \*\*plain student\*\* \| {plain} ± {others} \|', table, re.MULTILINE)


def test_the_order_is_that_of_the_table():
    known = {recipe.name: recipe for recipe in recipes()}
    for kind, names in ORDER.items():
        scores = [known[name].evidence[kind][1] for name in names]
        assert scores == sorted(scores, reverse=True) and len(names) > 1


def test_a_recipe_of_ones_own(pair, monkeypatch):
    monkeypatch.setattr(RECIPES, '_module_dict', dict(RECIPES.module_dict))
    register(Recipe('mine', 'detection', 'what', 'why', lambda student, teacher: dict(
        loss_x=dict(type='FitNetLoss', at='neck'))))
    choice = choose(*pair, name='mine')
    assert choice.losses['loss_x']['type'] == 'FitNetLoss' and 'not measured by us' in choice.steps[-1]
