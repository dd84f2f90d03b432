"""``kd-mm check --data N``: what is wrong with data is named with its file, before a training."""

import copy
import json
import shutil

import pytest
from mmdet.evaluation import CocoMetric
from pairs import detection_pair, kd_mm, message
from pycocotools.coco import COCO
from stock import detector, hook, segmentor, wide

from kd_mm.lab import data
from kd_mm.lab.commands.train import check_data
from kd_mm.lab.data import look_at_data, picture_size
from kd_mm.lab.models import build_student, scope_of


@pytest.fixture
def det(coco_root, tmp_path):
    shutil.copytree(coco_root, tmp_path / 'coco')
    return detector(tmp_path / 'coco', tmp_path / 'work', by_epoch=True)


def annotated(cfg, tmp_path, change):
    content = json.loads((tmp_path / 'coco' / 'annotations.json').read_text())
    change(content)
    (tmp_path / 'coco' / 'other.json').write_text(json.dumps(content))
    cfg.train_dataloader.dataset.ann_file = 'other.json'
    return look_at_data(cfg, 4)


def test_nothing_is_wrong(det):
    report = look_at_data(det, 3)
    assert not report.problems and not report.warnings and report.length == 8
    assert report.notes == ['3 of 8 samples of train_dataloader.dataset']


def test_the_size_of_training_pictures(det, tmp_path):
    """As the pipeline gives them, the largest edge of each side; of a data set that is not there nothing is known."""
    size = picture_size(det)
    assert size is not None and max(size) == 64
    resize = next(step for step in det.train_dataloader.dataset.pipeline if step['type'] == 'Resize')
    resize.update(scale=(96, 64), keep_ratio=False)
    assert picture_size(det) == (64, 96)
    det.train_dataloader.dataset.ann_file = 'nowhere.json'
    assert picture_size(det) is None


def test_the_loaders_function_makes_a_batch(det):
    """A training meets it in its first step; `pseudo_collate` is the host's own."""
    det.train_dataloader.collate_fn = dict(type='pseudo_collate')
    assert not look_at_data(det, 3).problems
    det.train_dataloader.collate_fn = dict(type='pseudo_collate', size=3)
    problem, = look_at_data(det, 3).problems
    assert problem.startswith('train_dataloader.collate_fn cannot make a batch of 3 samples: TypeError: pseudo_collate')


@pytest.mark.parametrize('section, number, key, said', [
    ('annotations', 3, 'area', "1 of 14 annotations in .*other.json have no 'area', first: .*\"id\": 4"),
    ('images', 2, 'height', "1 of 8 images in .*other.json have no 'height'"),
    ('images', 5, 'file_name', "1 of 8 images in .*other.json have no 'file_name'"),
    ('categories', None, None, "other.json has no 'categories'; COCO's form")])
def test_missing_keys_of_annotations(det, tmp_path, section, number, key, said):
    def change(content):
        if number is None:
            del content[section]
        else:
            del content[section][number][key]

    problem, = annotated(det, tmp_path, change).problems
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(problem)
    assert problem.startswith('train_dataloader.dataset cannot be opened: KeyError')


def test_data_without_a_sample(det, tmp_path):
    """mmdet's own words for it are 'need at least one array to concatenate'."""
    det.train_dataloader.dataset.update(metainfo=dict(classes=('cat', 'dog')), filter_cfg=dict(filter_empty_gt=True))
    file = tmp_path / 'coco' / 'annotations.json'
    expected = (f'train_dataloader.dataset: the data set has no sample: no picture is listed, or none is left after '
                f'filter_cfg. None of its classes (cat, dog) is a category of {file} (square, disc): give the classes '
                'of the data, metainfo=dict(classes=...)')
    assert look_at_data(det, 4).problems == [expected]
    det.train_dataloader.dataset.metainfo = None  # those of COCO, by the class of the data set
    assert '(person, bicycle, car, motorcycle, airplane, ...) is a category' in look_at_data(det, 4).problems[0]
    det.train_dataloader.dataset.metainfo = dict(classes=('cat', 'dog'))
    det.dump(str(tmp_path / 'a.py'))
    result = kd_mm('train', tmp_path / 'a.py', '--work-dir', tmp_path / 'run')
    assert result.exit_code == 1 and expected in message(result)
    empty = annotated(det, tmp_path, lambda content: content.update(images=[], annotations=[]))
    assert 'the data set has no sample' in empty.problems[0]


@pytest.mark.parametrize('kind', ['CocoMetric', 'mmdet.CocoMetric', CocoMetric, 'CocoOccludedSeparatedMetric'])
def test_annotations_that_cannot_be_evaluated(det, tmp_path, kind):
    file = tmp_path / 'coco' / 'annotations.json'
    content = json.loads(file.read_text())
    det.val_cfg, det.val_dataloader = dict(type='ValLoop'), det.train_dataloader
    det.val_evaluator = dict(type=kind, ann_file=str(file))
    for present in (True, False):
        content.pop('info', None)
        file.write_text(json.dumps(dict(content, info={}) if present else content))
        truth = COCO(str(file))
        try:  # the library itself says whether it can
            truth.loadRes([dict(image_id=content['images'][0]['id'], category_id=1, bbox=[0, 0, 2, 2], score=1.0)])
            said = False
        except KeyError:
            said = True
        problems = look_at_data(det, 1).problems
        assert len(problems) == said and all("has no 'info'" in problem for problem in problems)
        assert not (present and said)
        if said:  # a training says it too, before its first step
            with pytest.raises(SystemExit, match="val_evaluator: .*has no 'info'"):
                check_data(det, ['val'])
        else:
            check_data(det, ['val'])


def test_commands_say_it_before_they_train(coco_root, tmp_path, monkeypatch):
    """Where the installed library needs ``info``, whichever version that is."""
    monkeypatch.setattr(data, '_info_is_needed', lambda: True)
    root = shutil.copytree(coco_root, tmp_path / 'coco')
    content = json.loads((root / 'annotations.json').read_text())
    del content['info']
    (root / 'annotations.json').write_text(json.dumps(content))
    pair = detection_pair(tmp_path / 'pair', root)
    for words in (('train', pair.student), ('distill', pair.student, '--teacher', pair.teacher, '--teacher-ckpt',
                                            pair.weights)):
        result = kd_mm(*words, '--work-dir', tmp_path / words[0])
        assert result.exit_code == 1 and "annotations.json has no 'info'" in message(result), message(result)
        assert not list((tmp_path / words[0]).rglob('*.pth'))


def test_a_file_that_ends_too_early(det, tmp_path):
    (tmp_path / 'coco' / 'annotations.json').write_text('{"images": [')
    assert 'is no whole JSON file' in look_at_data(det, 2).problems[0]
    (tmp_path / 'coco' / 'annotations.json').unlink()
    assert 'looked at' in look_at_data(det, 2).problems[0]


def test_classes_that_no_annotation_has(det, tmp_path):
    def change(content):
        for category in content['categories']:
            category['name'] += 's'

    report = annotated(det, tmp_path, change)
    assert not report.problems and 'Are its classes (square, disc) the names of the categories' in report.warnings[0]


def test_a_cut_picture_and_one_that_is_not_there(det, tmp_path, capsys):
    (tmp_path / 'coco' / 'images' / '0006.png').unlink()
    file = tmp_path / 'coco' / 'images' / '0002.png'
    file.write_bytes(file.read_bytes()[:200])
    problems = look_at_data(det, 4).problems
    assert len(problems) == 2 and f'sample 2: {file} cannot be read as a picture' in problems[0]
    assert 'sample 6: no such file: ' in problems[1]
    det.custom_hooks = [hook(wide(det), dict(loss_f=dict(type='FitNetLoss', at='neck')))]
    det.dump(str(tmp_path / 'config.py'))
    words = ['check', tmp_path / 'config.py', '--shape', 64, 64]
    assert kd_mm(*words).exit_code == 0
    result = kd_mm(*words, '--data', 4)
    assert result.exit_code == 1 and 'cannot be read as a picture' in message(result)
    # and the length of an epoch is known, whether samples are loaded or not
    for flags in (['--data', 1], []):
        result = kd_mm(*words, *flags, '--plot', tmp_path / 'curves.svg')
        assert result.exit_code == 0, message(result)
        assert 'epoch (2 iterations each)' in (tmp_path / 'curves.svg').read_text()
        assert 'taken as' not in result.output
        (tmp_path / 'curves.svg').unlink()


def test_labels_beyond_the_classes_and_a_config_without_data(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path, classes=1)
    with scope_of(cfg):
        student = build_student(cfg)
    assert 'the labels 1 are beyond the 1 classes of the student' in look_at_data(cfg, 2, student).problems[0]
    nothing = copy.deepcopy(cfg)
    nothing.train_dataloader = None
    assert 'has no train_dataloader with a dataset' in look_at_data(nothing, 2).problems[0]
