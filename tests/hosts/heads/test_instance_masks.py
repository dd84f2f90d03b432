"""Masks that one-stage heads make from kernels: the host's own at the same priors, and what is refused."""

import copy

import pytest
import torch
from instance_heads import KINDS, batch_of, build
from two_stage import build_two_stage

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.heads.dense import dense_view
from kd_mm.hosts.heads.instance_masks import instance_mask_taps, instance_masks, kind_of
from kd_mm.hosts.taps import Tap

KD = dict(type='SigmoidKDLoss', at='@instance_masks')


@pytest.fixture(scope='module')
def models():
    return {(kind, seed): build(kind, seed, 8 + 4 * seed) for kind in KINDS for seed in (0, 1)}


def recorded(model, side, data):
    """What the taps of one side record in the pass of that side."""
    taps = [Tap(model, path, side, structured=True) for path in instance_mask_taps(side, model)]
    for tap in taps:
        tap.arm()
    try:
        if side == 'student':
            losses = model(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        else:
            with torch.no_grad():
                losses = model(data['inputs'], copy.deepcopy(data['data_samples']), mode='tensor')
        return losses, {tap.path: tap.read() for tap in taps}
    finally:
        for tap in taps:
            tap.clear()


def masks_of(student, teacher, data):
    kind = kind_of(student, 'student')
    return instance_masks(kind, recorded(student, 'student', data)[1], recorded(teacher, 'teacher', data)[1])


@pytest.mark.parametrize('kind', KINDS)
def test_a_copy_makes_the_same_masks(models, kind):
    """The teacher is asked at the student's priors: a copy of the student agrees, another model does not."""
    student = models[kind, 0].eval()  # norms as in the teacher's pass
    data = batch_of(student)
    own, theirs = masks_of(student, copy.deepcopy(student), data)
    assert own.dim() == 4 and own.shape[1] == 1 and len(own) > 1 and own.requires_grad and not theirs.requires_grad
    scale = own.std().item()  # small in a model that has learned nothing
    assert scale > 0 and torch.allclose(own, theirs, atol=1e-4 * scale)
    _, others = masks_of(student, models[kind, 1].eval(), data)
    assert others.shape == own.shape and not torch.allclose(own, others, atol=0.1 * scale)
    # Not the same mask for every prior, else the order of the rows would not be tested.
    assert (own - own[:1]).abs().amax() > 0.1 * scale


@pytest.mark.parametrize('kind', KINDS)
def test_they_are_those_of_the_hosts_loss(models, kind):
    """The host's mask loss, worked out from the rows, is the one that it has returned."""
    student = models[kind, 0].eval()
    head = student.bbox_head if kind == 'rtmdet_ins' else student.mask_head
    seen = []
    handle = head.loss_mask.register_forward_hook(lambda module, args, output: seen.append(args[0].detach()))
    data = batch_of(student)
    try:
        own, _ = masks_of(student, student, data)
    finally:
        handle.remove()
    found = own[:, 0].detach()
    if kind == 'rtmdet_ins':
        found = torch.nn.functional.interpolate(found[None], scale_factor=2, mode='bilinear')[0]
        assert torch.allclose(found, seen[0], atol=1e-5)
    else:  # level by level, or image by image: the same masks in another order
        theirs = torch.cat(seen)
        assert theirs.shape == found.shape
        gaps = torch.cdist(found.flatten(1), theirs.flatten(1), compute_mode='donot_use_mm_for_euclid_dist')
        assert max(gaps.amin(dim=0).max(), gaps.amin(dim=1).max()) < 1e-4 * gaps.max()


@pytest.mark.parametrize('kind', KINDS)
def test_an_image_without_objects(models, kind):
    student, teacher = models[kind, 0].eval(), models[kind, 1].eval()
    data = batch_of(student)
    data['data_samples'][0].gt_instances = data['data_samples'][0].gt_instances[:0]
    own, theirs = masks_of(student, teacher, data)
    assert own.shape == theirs.shape
    full = masks_of(student, teacher, batch_of(student))[0]
    assert 0 < len(own) < len(full) and own.shape[2:] == full.shape[2:]


@pytest.mark.parametrize('kind', KINDS)
def test_no_objects_at_all(models, kind):
    student, teacher = models[kind, 0].train(), models[kind, 1]
    data = batch_of(student)
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    distiller = Distiller(student, teacher, dict(loss_masks=KD), scope='mmdet')
    distiller.attach()
    try:
        losses = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
    assert losses['loss_masks'] == 0


def test_masks_of_another_size_are_resized():
    """A teacher whose masks have half the student's stride."""
    student = build('solov2').eval()
    teacher = build('solov2', 1, mask_head=dict(mask_feature_head=dict(mask_stride=8, start_level=1, end_level=3)))
    own, theirs = masks_of(student, teacher.eval(), batch_of(student))
    assert own.shape == theirs.shape


def test_the_dense_view_of_an_instance_head(models):
    """RTMDet-Ins returns mask features after its maps; the losses on dense heads compare the maps."""
    for kind in ('rtmdet_ins', 'condinst'):
        model = models[kind, 0].eval()
        with torch.no_grad():
            output = model.bbox_head(model.extract_feat(batch_of(model)['inputs']))
        view = dense_view(model.bbox_head, output)
        assert len(view) == len(output[0]) and view.boxes[0].shape == (*view.logits[0].shape[:2], 4)
        assert (view.quality is not None) == (kind == 'condinst')


def test_towers_that_are_one(models):
    """mmdet gives RTMDet-Ins one tower for classes and boxes: CrossKD cannot swap one of them."""
    with pytest.raises(ValueError, match='RTMDetInsSepBNHead: cls_convs and reg_convs are the same convolutions'):
        Distiller(models['rtmdet_ins', 0], models['rtmdet_ins', 1],
                  dict(loss_cross=dict(type='CrossKDLoss', at='bbox_head')), scope='mmdet')


@pytest.mark.parametrize('build_other, message', [
    (lambda: build('mask_rcnn'), "MaskRCNN makes no masks from kernels .*write at='@roi_masks'"),
    (lambda: build('mask2former'), 'MaskQueryLoss'),
    (lambda: build_two_stage('faster'), 'Tap maps')])
def test_models_without(models, build_other, message):
    with pytest.raises(ValueError, match=message):
        Distiller(models['solov2', 0], build_other(), dict(loss_masks=KD), scope='mmdet')


def test_heads_that_do_not_fit(models):
    with pytest.raises(ValueError, match='RTMDetInsHead and the teacher a SOLOV2Head, whose priors are others'):
        Distiller(models['rtmdet_ins', 0], models['solov2', 0], dict(loss_masks=KD), scope='mmdet')
    with pytest.raises(ValueError, match='grids of the teacher'):
        Distiller(models['solov2', 0], build('solov2', mask_head=dict(num_grids=[12, 10, 8, 6, 4])),
                  dict(loss_masks=KD), scope='mmdet')
    for options, message in ((dict(levels=[0]), 'remove levels'), (dict(proposals='teacher'), 'at a place of RoIs'),
                             (dict(region=dict(type='GTMaskRegion')), 'gives rows'),
                             (dict(classes='common'), 'is for logit losses')):
        with pytest.raises(ValueError, match=message):
            Distiller(models['solov2', 0], models['solov2', 1], dict(loss_masks=dict(KD, **options)), scope='mmdet')
