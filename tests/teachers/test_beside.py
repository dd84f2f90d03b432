"""A teacher that is shown another picture of the scene: real files, real pipelines of both hosts."""

import copy

import cv2
import numpy as np
import pytest
import torch
from conftest import write_cityscapes, write_coco
from stock import detector, distill_hook, hook, make_runner, segmentor, teacher_of, train

from kd_mm.hosts.transforms import LoadImageBeside, SplitImageBeside
from kd_mm.teachers.base import Teacher

FIT = dict(loss_fit=dict(type='FitNetLoss', at='neck'))
FLIP = dict(type='RandomFlip', prob=1.0)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Infrared of 8 bits and depth of 16 bits beside each picture: its own negative, and a ramp."""
    folder = write_coco(tmp_path_factory.mktemp('coco'))
    for name in ('infrared', 'depth'):
        (folder / name).mkdir()
    for path in (folder / 'images').iterdir():
        picture = cv2.imread(str(path))
        cv2.imwrite(str(folder / 'infrared' / path.name), 255 - picture[..., 0])
        ramp = np.tile(np.linspace(0, 60000, picture.shape[1], dtype=np.uint16), (picture.shape[0], 1))
        cv2.imwrite(str(folder / 'depth' / path.name), ramp)
    return folder


def beside(cfg, key='infrared', keep=True, **options):
    """The config with the field in its pipeline."""
    cfg = copy.deepcopy(cfg)
    options = options or dict(replace=('images', key))
    load, annotations, resize, pack = cfg.train_dataloader.dataset.pipeline
    keys = ['img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction']
    cfg.train_dataloader.dataset.pipeline = [
        load, annotations, dict(type='kd_mm.LoadImageBeside', key=key, **options), resize, FLIP,
        dict(type='kd_mm.SplitImageBeside', key=key), dict(pack, meta_keys=[*keys, key] if keep else keys)]
    return cfg


def infrared_teacher(cfg, channels=1):
    numbers = dict(mean=[100.0], std=[50.0]) if channels == 1 else dict(mean=None, std=None)
    return teacher_of(cfg, data_preprocessor=dict(bgr_to_rgb=False, **numbers), backbone=dict(in_channels=channels))


def test_the_teacher_sees_the_field_and_the_student_what_it_saw(root, tmp_path):
    det = detector(root, tmp_path)
    plain = copy.deepcopy(det)
    plain.train_dataloader.dataset.pipeline.insert(3, FLIP)
    original = Teacher.prepare
    pictures = {}

    def prepare(self, inputs, data_samples, batch):
        found = original(self, inputs, data_samples, batch)
        pictures['inputs'], pictures['images'] = inputs, found[0]
        return found

    Teacher.prepare = prepare
    try:
        runner, record = train(beside(det), [hook(infrared_teacher(det), FIT, input_key='infrared')])
    finally:
        Teacher.prepare = original
    inputs, images = pictures['inputs'], pictures['images']
    assert images.shape == (4, 1, *inputs.shape[-2:])
    student = runner.model.data_preprocessor
    bgr = (inputs * student.std + student.mean).flip(1)
    assert torch.allclose(images[:, 0] * 50 + 100, 255 - bgr[:, 0], atol=1e-3)  # flipped and resized alike
    assert all(step['loss_fit'] > 0 for step in record.losses)
    # the student's own losses are those of its config without the field
    _, stock = train(plain, [hook(teacher_of(plain), dict(loss_fit=dict(FIT['loss_fit'], loss_weight=0.0)))])
    assert record.losses[0]['loss_cls'] == stock.losses[0]['loss_cls']


def test_depth_in_sixteen_bits(root, tmp_path):
    det = detector(root, tmp_path)
    cfg = beside(det, 'depth', template='{folder}/../depth/{stem}.png')
    dataset = make_runner(cfg).build_dataloader(cfg.train_dataloader).dataset
    sample = dataset[0]
    depth = sample['data_samples'].depth
    assert depth.dtype == np.float32 and depth.shape == (64, 64, 1) and depth.max() == 60000 and depth[0, 0, 0] == 60000
    plain = copy.deepcopy(det)
    plain.train_dataloader.dataset.pipeline.insert(3, FLIP)
    stock = make_runner(plain).build_dataloader(plain.train_dataloader).dataset[0]
    assert sample['inputs'].dtype == torch.uint8 and torch.equal(sample['inputs'], stock['inputs'])
    teacher = teacher_of(det, data_preprocessor=dict(mean=[30000.0] * 3, std=[20000.0] * 3))
    _, record = train(cfg, [hook(teacher, FIT, input_key='depth', view=dict(scale=0.5))])
    assert all(0 < step['loss_fit'] < 1e6 for step in record.losses)


def test_a_segmentor(tmp_path):
    root = write_cityscapes(tmp_path / 'city')
    for path in (root / 'leftImg8bit' / 'train' / 'town').iterdir():
        (root / 'leftImg8bit' / 'heat').mkdir(exist_ok=True)
        cv2.imwrite(str(root / 'leftImg8bit' / 'heat' / path.name), cv2.imread(str(path))[..., ::-1])
    seg = segmentor(root, tmp_path)
    load, annotations, pack = seg.train_dataloader.dataset.pipeline
    seg.train_dataloader.dataset.pipeline = [
        load, annotations, dict(type='kd_mm.LoadImageBeside', key='heat', replace=('train/town', 'heat')),
        dict(type='RandomCrop', crop_size=(48, 48)), dict(type='kd_mm.SplitImageBeside', key='heat'),
        dict(pack, meta_keys=('img_path', 'img_shape', 'heat'))]
    losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits'))
    runner, record = train(seg, [hook(teacher_of(seg), losses, input_key='heat')])
    assert all(step['loss_kd'] > 0 for step in record.losses)
    # the field is the picture with its channels reversed, so that it is what an RGB teacher would see of a BGR one
    teacher = distill_hook(runner).distiller.teacher
    data = next(iter(runner.train_dataloader))
    given = runner.model.data_preprocessor(data, True)
    images, _ = teacher.prepare(given['inputs'], given['data_samples'], None)
    raw = given['inputs'][..., :48, :48] * teacher._from.std + teacher._from.mean
    assert torch.allclose(images[..., :48, :48], (raw.flip(1) - teacher._to.mean) / teacher._to.std, atol=1e-4)
    assert images.shape[-2:] == (64, 64) and float(images[..., 48:, :].abs().max()) == teacher._to.pad_value


def test_what_is_missing_is_told_before_the_first_step(root, tmp_path):
    det = detector(root, tmp_path)
    teacher = infrared_teacher(det)
    for cfg, key, message in (
            (det, 'infrared', r'input_key=.infrared., and the metainfo of a training sample has .*img_shape.* only: '
                              r'put it beside the picture with dict\(type=.kd_mm.LoadImageBeside'),
            (beside(det, keep=False), 'infrared', 'in meta_keys of PackDetInputs or PackSegInputs'),
            (beside(det), 5, 'input_key=5 must be the name of a field'),
            (beside(det, replace=('images', 'nothing')), 'infrared', 'has no infrared picture: .* is not there'),
            (beside(det, replace=('visible', 'infrared')), 'infrared', "'visible' of replace is not in the path")):
        with pytest.raises(ValueError, match=message):
            train(cfg, [hook(teacher, FIT, input_key=key)])
    with pytest.raises(ValueError, match="takes pictures of 2 channels, and the field 'infrared' has 1"):
        train(beside(det), [hook(infrared_teacher(det, 2), FIT, input_key='infrared')])


@pytest.mark.parametrize('arguments, message', [
    (dict(key='img', replace=('a', 'b')), "key='img' must be"), (dict(key='ir'), 'give replace'),
    (dict(key='ir', replace='ab'), 'give replace'),
    (dict(key='ir', replace=('a', 'b'), color_type='rgb'), 'color_type')])
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoadImageBeside(**arguments)
    with pytest.raises(ValueError, match='no LoadImageBeside'):
        SplitImageBeside('ir')(dict(img=np.zeros((2, 2, 3))))


def test_another_size_is_told(root, tmp_path):
    path = next((root / 'images').iterdir())
    cv2.imwrite(str(tmp_path / 'small.png'), np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match='small.png has 8x8 pixels and .* 64x64: both must show the same'):
        LoadImageBeside('ir', template=str(tmp_path / 'small.png'))(
            dict(img=cv2.imread(str(path)), img_path=str(path)))
