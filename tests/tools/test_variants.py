"""The study of single settings: what it trains, and that its page is made from its results."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / 'tools' / 'studies')]

import variants  # noqa: E402


@pytest.fixture
def data(tmp_path):
    """All that the plan reads of a data set: how many images there are."""
    folder = tmp_path / 'bccd' / 'annotations'
    folder.mkdir(parents=True)
    (folder / 'instances_train.json').write_text(json.dumps(dict(images=[{}] * 8)))
    return folder.parent


@pytest.fixture
def settings():
    from benchmark import read_settings
    return read_settings('det')


@pytest.mark.parametrize('study', ['weights', 'speed'])
def test_whole_seeds_come_one_after_the_other(study, data, settings, tmp_path):
    todo = variants.plan(study, 'det', settings, 2, data, tmp_path / 'work')
    assert [stage.name for stage in todo[:2]] == ["teacher", "plain"]
    assert len({stage.title for stage in todo}) == len(todo)
    seeds = [stage.seed for stage in todo[1:]]
    assert seeds == sorted(seeds) and seeds.count(0) == seeds.count(1)
    assert all(stage.needs == (todo[0], ) for stage in todo if stage.name not in ('teacher', 'plain'))


def test_a_variant_is_an_ordinary_config_that_differs_in_the_setting(data, settings, tmp_path):
    from mmengine.config import Config
    todo = {stage.name: stage for stage in variants.plan('weights', 'det', settings, 1, data, tmp_path / 'work')}
    published, measured = (Config.fromfile(str(todo[name].config)).custom_hooks[0] for name in ('mgd', 'mgd, auto'))
    assert measured.losses.loss_mgd.loss_weight == 'auto' != published.losses.loss_mgd.loss_weight
    published.losses.loss_mgd.loss_weight = 'auto'
    assert published == measured
    speeds = {stage.name: stage for stage in variants.plan('speed', 'det', settings, 1, data, tmp_path / 'work')}
    assert Config.fromfile(str(speeds['cwd, bf16'].config)).custom_hooks[0].speed.precision == 'bf16'


def test_a_result_depends_on_what_the_training_depends_on(data, settings, tmp_path):
    def hashes():
        return {stage.title: stage.config_hash for stage in variants.plan(
            'weights', 'det', settings, 1, data, tmp_path / 'work')}

    before = hashes()
    assert before == hashes()
    settings.methods.mgd.losses.loss_mgd.mask_ratio = 0.1
    changed = {title for title, value in hashes().items() if value != before[title]}
    assert changed == {'det: mgd, seed 0', 'det: mgd, auto, seed 0'}


def test_what_is_better_is_said_by_the_interval():
    runs = {name: {str(seed): dict(score=score) for seed, score in enumerate(scores)}
            for name, scores in dict(plain=[10.0, 12.0, 11.0], up=[12.1, 14.0, 13.0], same=[11.0, 11.0, 11.0]).items()}
    content = dict(title='', metric='COCO mAP', runs=runs, against=dict(plain='', up='plain', same='plain'))
    lines = variants.table(content).splitlines()
    assert '| up | 13.0 ± 1.0 | 3 |' in lines[3] and lines[3].endswith('| plain | +2.0 [+1.9, +2.2] | better |')
    assert lines[4].endswith('| no difference shown |')
    assert variants.compared(runs, 'plain', 'up')[2] == 'worse'
    assert variants.compared(runs, 'up', 'none') == ['', '', '']


def test_the_page_has_what_the_results_have():
    text = variants.PAGE.read_text()
    assert variants.page(text, variants.load()) == text, 'run: python tools/studies/variants.py --render'
