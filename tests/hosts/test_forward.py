"""The raw forward of host models: heads that say less in evaluation than in training."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from stock import retinanet_model, traces

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.forward import forward_tensor
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.zoo import zoo_config


def guided(seed=0, base=8):
    """Guided anchoring's RetinaNet, narrowed."""
    cfg = Config.fromfile(str(zoo_config('mmdet::guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py')))
    cfg.merge_from_dict(dict(model=retinanet_model(base)))
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(cfg, 'mmdet')
        model.init_weights()
    return model


def test_guided_anchors_are_compared_everywhere():
    """In evaluation they predict where they expect an object, image by image; the teacher's pass has all places."""
    teacher = guided(1, 12).eval()
    data = teacher.data_preprocessor(synthetic_batch(teacher, 2, (64, 64)), False)
    with torch.no_grad():
        with pytest.raises(Exception):  # noqa: B017 - the host's own: an assertion, or an operation for GPUs alone
            teacher(**data, mode='tensor')
        scores = forward_tensor(teacher, data['inputs'], data['data_samples'])[0]
    assert not teacher.training and not teacher.bbox_head.training and scores[0].shape[0] == 2
    # As in training, with the norms of evaluation.
    teacher.bbox_head.training = True
    with torch.no_grad():
        expected = teacher(**data, mode='tensor')[0]
    teacher.bbox_head.training = False
    assert all(torch.equal(own, other) for own, other in zip(scores, expected))


def test_guided_anchors_teach_their_logits():
    student, teacher = guided(), guided(1, 12)
    before = traces(student)
    distiller = Distiller(student, teacher, dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits')), scope='mmdet')
    data = student.data_preprocessor(synthetic_batch(student, 2, (64, 64)), True)
    student.train()
    distiller.attach()
    try:
        losses = student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
    finally:
        distiller.detach()
    losses['loss_kd'].backward()
    assert losses['loss_kd'] > 0 and student.bbox_head.retina_cls.weight.grad.abs().sum() > 0
    assert traces(student) == before
