"""The teacher: its own normalisation, its weights, its limits."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from stock import detector, make_runner, retinanet_model, segmentor, teacher_of

from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import build_model, class_names, load_config, task_of
from kd_mm.hosts.samples import Samples
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.taps import Tap
from kd_mm.hosts.weights import inherit_weights
from kd_mm.hosts.zoo import zoo_config
from kd_mm.ops.modes import eval_mode, preserved_random_state
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.preprocess import Normalisation
from kd_mm.types.batch import KDBatch, Targets

CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detector(coco_root, tmp_path_factory.mktemp('det'))


@pytest.fixture(scope='module')
def student(det):
    return make_runner(det).model


def images(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def through(model, pictures):
    """The batch as ``model``'s own preprocessor makes it, with the sizes before padding."""
    from mmdet.structures import DetDataSample
    samples = [DetDataSample(metainfo=dict(img_shape=tuple(picture.shape[1:]))) for picture in pictures]
    return model.data_preprocessor(dict(inputs=[picture.clone() for picture in pictures], data_samples=samples), False)


@pytest.mark.parametrize('override', [
    CAFFE, dict(mean=None, std=None, bgr_to_rgb=True), dict(mean=None, std=None, bgr_to_rgb=False),
    dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True), dict(CAFFE, pad_value=114)],
    ids=['caffe BGR', 'raw RGB', 'raw BGR', 'other RGB', 'padded with 114'])
def test_batch_is_what_the_teachers_preprocessor_would_make(det, student, override):
    """RGB student, other teacher, two images of different size: equal to the teacher's own preprocessing."""
    teacher = Teacher.build(teacher_of(det, data_preprocessor=override), student, 'random', scope='mmdet')
    assert not teacher.same_input
    pictures = images((40, 64), (64, 50))
    own, wanted = through(student, pictures), through(teacher.model, pictures)
    batch = KDBatch(Targets(tuple(own['inputs'].shape[-2:]), source=Samples(own['data_samples'])))
    converted = teacher.renormalise(own['inputs'], batch)
    torch.testing.assert_close(converted, wanted['inputs'], rtol=1e-5, atol=2e-4)
    assert (own['inputs'] - converted).abs().max() > 1


def test_equal_preprocessors_cost_nothing(det, student):
    teacher = Teacher.build(teacher_of(det), student, 'random', scope='mmdet')
    batch = torch.randn(1, 3, 8, 8)
    assert teacher.same_input and teacher.renormalise(batch, KDBatch(input_shape=(8, 8))) is batch


def test_segmentors_preprocessor(cityscapes_root, tmp_path):
    cfg = segmentor(cityscapes_root, tmp_path)
    student = make_runner(cfg).model
    teacher = Teacher.build(teacher_of(cfg, data_preprocessor=CAFFE), student, 'random', scope='mmseg')
    from mmseg.structures import SegDataSample
    pictures = images((64, 64), (64, 64))

    def samples():
        return [SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 64, 64)), metainfo=dict(img_shape=(64, 64)))
                for _ in pictures]

    own = student.data_preprocessor(dict(inputs=copy.deepcopy(pictures), data_samples=samples()), True)
    wanted = teacher.model.data_preprocessor(dict(inputs=copy.deepcopy(pictures), data_samples=samples()), True)
    batch = KDBatch(Targets((64, 64), source=Samples(own['data_samples'])))
    torch.testing.assert_close(teacher.renormalise(own['inputs'], batch), wanted['inputs'], rtol=1e-5, atol=2e-4)


def test_runs_as_far_as_needed_and_gives_the_same(det, student):
    teacher = Teacher.build(teacher_of(det), student, 'random', scope='mmdet')
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 64)), False)
    batch = KDBatch(Targets((64, 64), source=Samples(data['data_samples'])))
    tap = Tap(teacher.model, 'backbone.layer2', 'teacher')
    calls = []
    teacher.model.backbone.layer3.register_forward_pre_hook(lambda *_: calls.append(1))
    teacher.run(data['inputs'], data['data_samples'], [tap], batch, full=True)
    first = tap.read()
    teacher.run(data['inputs'], data['data_samples'], [tap], batch)
    second = tap.read()
    assert calls == [1] and torch.equal(first[0], second[0]) and not second[0].requires_grad
    assert teacher.calls == {'backbone.layer2': 1}


def test_after_a_run_only_what_was_tapped_is_alive(det, student):
    """Also where the signal that stops the forward, or an error, has passed through all of its frames."""
    teacher = Teacher.build(teacher_of(det), student, 'random', scope='mmdet')
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 64)), False)
    batch = KDBatch(Targets((64, 64), source=Samples(data['data_samples'])))
    tap, seen = Tap(teacher.model, 'neck.fpn_convs.1.conv', 'teacher'), {}

    def look(name, value):
        if isinstance(value, torch.Tensor):
            seen[name] = weakref.ref(value)
        elif isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                look(f'{name}/{index}', item)

    for name, module in teacher.model.named_modules():
        module.register_forward_hook(lambda _, given, output, name=name: look(name, output))

    def alive():
        return {id(reference()): name for name, reference in seen.items() if reference() is not None}

    gc.disable()  # what only the collector of cycles would free is alive until it comes
    try:
        for full in (True, False, False):
            seen.clear()
            teacher.run(data['inputs'], data['data_samples'], [tap], batch, full=full)
            # The signal passes the hooks of the tapped module, so that its output is not among those seen.
            assert len(seen) > 20 and len(alive()) == int(full)
            assert tap.read()[0].shape[1] == 16 and not alive()
        later = teacher.model.neck.fpn_convs[2]
        later.forward = lambda x: 1 / 0
        other = Tap(teacher.model, 'neck.fpn_convs.2', 'teacher')
        seen.clear()
        with pytest.raises(ZeroDivisionError) as error:
            teacher.run(data['inputs'], data['data_samples'], [tap, other], batch)
        del error
        tap.clear()
        assert not alive()
    finally:
        gc.enable()


def test_pretrained_backbones_are_not_downloaded(det, student):
    cfg = teacher_of(det)
    cfg['model']['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='https://nowhere.invalid/x.pth')
    assert 'Pretrained' not in str(Teacher.build(cfg, student, 'random', scope='mmdet').model.backbone.init_cfg)


def test_building_draws_nothing(det, student):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    Teacher.build(teacher_of(det), student, 'random', scope='mmdet')
    with preserved_random_state(1):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_eval_mode_restores_every_flag(student):
    student.train()
    student.backbone.layer1.eval()
    before = [module.training for module in student.modules()]
    with eval_mode(student):
        assert not any(module.training for module in student.modules())
    assert [module.training for module in student.modules()] == before


def test_class_names(det):
    coco = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dict(
        type='RepeatDataset', times=2, dataset=dict(type='CocoDataset')))))
    assert class_names(coco)[:2] == ['person', 'bicycle']
    assert class_names(coco, dict(meta=dict(dataset_meta=dict(CLASSES=('a', 'b'))))) == ['a', 'b']
    assert class_names(det) == ['square', 'disc']
    own = dict(type='CocoDataset', metainfo=dict(classes=('a', )))
    for parts, names in (([own, own], ['a']), ([own, dict(type='CocoDataset')], None)):  # the other has those of COCO
        several = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dict(
            type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=parts)))))
        assert class_names(several) == names
    assert class_names(Config(dict(model=dict()))) is None


def test_config_sources(det, tmp_path):
    cfg, name, path = load_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco')
    assert cfg.model.type == 'RetinaNet' and path.endswith('retinanet_r50_fpn_1x_coco.py')
    cfg, _, path = load_config(det.model.to_dict())
    assert cfg.model.type == 'RetinaNet' and path is None
    assert load_config(det)[0].model.bbox_head.num_classes == 2
    assert task_of(torch.nn.Linear(1, 1)) is None


def test_inherit_only_looks_or_copies(det):
    first, second = (build_model(Config(teacher_of(det)), 'mmdet') for _ in range(2))
    assert not torch.equal(first.neck.lateral_convs[0].conv.weight, second.neck.lateral_convs[0].conv.weight)
    before = first.neck.lateral_convs[0].conv.weight.clone()
    assert inherit_weights(first, second, ['neck'], apply=False) == []
    assert torch.equal(first.neck.lateral_convs[0].conv.weight, before)
    inherit_weights(first, second, ['neck'])
    assert torch.equal(first.neck.lateral_convs[0].conv.weight, second.neck.lateral_convs[0].conv.weight)
    wide = build_model(Config(teacher_of(det, **retinanet_model(neck=24))), 'mmdet')
    assert 'differs' in inherit_weights(first, wide, ['neck'])[0]


def test_normalisation_of_models_without_one():
    empty = Normalisation(None)
    assert empty == Normalisation(SimpleNamespace()) and empty.mean.sum() == 0 and empty.std.sum() == 1


def test_auxiliary_head_does_not_fire_other_taps_twice(cityscapes_root, tmp_path):
    student = make_runner(segmentor(cityscapes_root, tmp_path)).model
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 64)), False)
    batch = KDBatch(Targets((64, 64), source=Samples(data['data_samples'])))
    teacher = Teacher.build(teacher_of(segmentor(cityscapes_root, tmp_path)), student, 'random', scope='mmseg')
    paths = ['backbone.layer1', 'decode_head.conv_seg', 'auxiliary_head.conv_seg']
    for count in (3, 1):  # with the others, and alone
        taps = [Tap(teacher.model, path, 'teacher') for path in paths[-count:]]
        for full in (True, False):
            teacher.run(data['inputs'], data['data_samples'], taps, batch, full=full)
            assert [tap.calls for tap in taps] == [1] * count
            assert all(len(tap.read()) == 1 for tap in taps)
    assert 'extract_feat' not in vars(teacher.model)


def test_mask_transformers_of_mmseg_get_their_samples():
    """mmseg's raw forward calls the head without the samples that it needs, and fails."""
    cfg = Config.fromfile(str(zoo_config('mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py')))
    cfg.model.backbone.norm_cfg = dict(type='BN', requires_grad=False)
    cfg.model.data_preprocessor.size = (64, 64)
    model = build_model(cfg, 'mmseg').eval()
    data = model.data_preprocessor(synthetic_batch(model, 1, (64, 64)), False)
    before = [sorted(sample.metainfo) for sample in data['data_samples']]
    with pytest.raises(TypeError):
        model(data['inputs'], data['data_samples'], mode='tensor')
    with torch.no_grad():
        scores, masks = forward_tensor(model, data['inputs'], data['data_samples'], ['decode_head.pixel_decoder'])
    assert masks[-1].shape[0] == 1 and scores[-1].shape[-1] == 20
    assert [sorted(sample.metainfo) for sample in data['data_samples']] == before
