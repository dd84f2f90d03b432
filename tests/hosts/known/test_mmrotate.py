"""MMRotate: detectors with rotated boxes (``make test STACK=rotate``)."""

import importlib.util

import pytest
import torch
from foundation import require

if importlib.util.find_spec('mmrotate') is None:
    pytest.skip('MMRotate is not installed: make test STACK=rotate', allow_module_level=True)
require('mmrotate')  # it imports torchvision, for which this declares what the CPU's torch lacks

from mmengine.config import Config  # noqa: E402
from rotate import CONFIGS, as_teacher, rotate_config, trainable, write_dota  # noqa: E402
from stock import hook, losses_of, train  # noqa: E402

from kd_mm.engine.distiller import Distiller  # noqa: E402
from kd_mm.hosts.heads.dense import dense_view, has_angle_bins, is_rotated  # noqa: E402
from kd_mm.hosts.models import build_model  # noqa: E402
from kd_mm.hosts.places import find  # noqa: E402
from kd_mm.hosts.samples import Samples  # noqa: E402
from kd_mm.hosts.synthetic import synthetic_batch  # noqa: E402
from kd_mm.hosts.table import host_of  # noqa: E402
from kd_mm.hosts.zoo import zoo_config  # noqa: E402
from kd_mm.lab.models import random_batch, scope_of  # noqa: E402
from kd_mm.ops.boxes import envelope  # noqa: E402
from kd_mm.ops.problems import ConfigProblems  # noqa: E402

pytestmark = pytest.mark.rotate
LOGITS = {'retinanet': 'retina_cls', 'retinanet_csl': 'retina_cls', 'fcos': 'conv_cls', 'fcos_csl': 'conv_cls',
          'rtmdet': 'rtm_cls.*'}
#: Families whose angle is a distribution -> its bins.
BINS = {'retinanet_csl': 45, 'fcos_csl': 180}


def build(family, seed=0):
    torch.manual_seed(seed)
    cfg = rotate_config(family)
    with scope_of(cfg):
        model = build_model(cfg, None)
        model.init_weights()
    head = model.bbox_head if hasattr(model, 'bbox_head') else model.rpn_head
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    return cfg, model.train()


@pytest.mark.parametrize('path, numbers', [
    ('gliding_vertex/gliding-vertex-qbox_r50_fpn_1x_dota.py', 8), ('cfa/cfa-qbox_r50_fpn_1x_dota.py', 8),
    (CONFIGS['retinanet'], 5), (CONFIGS['oriented_rcnn'], 5)])
def test_random_boxes_are_those_that_the_heads_learn_from(path, numbers):
    """Corners, or a centre with an angle; both inside of the picture."""
    cfg = Config.fromfile(str(zoo_config(f'mmrotate::{path}')))
    cfg.model.backbone.init_cfg = None
    with scope_of(cfg):
        batch = synthetic_batch(build_model(cfg, None), 2, (64, 96))
    for sample in batch['data_samples']:
        boxes = sample.gt_instances.bboxes.tensor
        assert len(boxes) and boxes.shape[1] == numbers
        upright = envelope(boxes)
        assert bool((upright[:, 2:] - upright[:, :2] > 1).all())
        centres = (upright[:, 2:] + upright[:, :2]) / 2
        assert bool((centres > 0).all() and (centres < centres.new_tensor([96, 64])).all())


@pytest.mark.parametrize('family', CONFIGS)
def test_features_and_logits(family):
    cfg, model = build(family)
    assert host_of(model).scope == 'mmrotate'
    if family in LOGITS:
        assert find(model, '@logits').paths == (f'bbox_head.{LOGITS[family]}', )
    losses = dict(loss_fgd=dict(type='FGDLoss', at='@neck'),
                  loss_fgfi=dict(type='FGFILoss', at='@neck', region=dict(
                      type='FineGrainedRegion', strides=[8, 16, 32, 64, 128] if family != 'rtmdet' else [8, 16, 32])),
                  loss_logits=dict(type='SigmoidKDLoss', at='@logits'))
    if family == 'oriented_rcnn':
        losses['loss_fgfi']['region']['strides'] = [4, 8, 16, 32, 64]
    with scope_of(cfg):
        distiller = Distiller(model, as_teacher(cfg), losses, teacher_ckpt='random', scope='mmrotate', seed=1)
        data = random_batch(model, 2, (128, 128))
        found = losses_of(model, distiller, data)
    assert all(torch.isfinite(found[name]) and found[name] > 0 for name in losses)
    boxes = Samples(data['data_samples'])
    assert all(level.shape[1] == 5 for level in boxes.rotated())
    assert all(torch.equal(envelope(a), b) for a, b in zip(boxes.rotated(), boxes.boxes()))


@pytest.mark.parametrize('family', LOGITS)
def test_views_of_rotated_heads(family):
    """The angle is neither a quality nor a side of a box, and boxes with an angle are not decoded as upright ones."""
    _, model = build(family)
    head = model.eval().bbox_head
    assert is_rotated(head) and has_angle_bins(head) == (family in BINS)
    with torch.no_grad():
        output = head(model.extract_feat(torch.rand(2, 3, 128, 128)))
    view = dense_view(head, output)
    assert (view.quality is not None) == family.startswith('fcos')
    if view.quality is not None:
        assert torch.equal(view.quality[0].flatten(), output[3][0].permute(0, 2, 3, 1).flatten())
    assert all(level.shape[1] == 2 for level in view.priors)
    with pytest.raises(ValueError, match='predicts no boxes that could be decoded'):
        view.boxes  # noqa: B018
    if family in BINS:
        assert view.distributions[0].shape[2:] == (1, BINS[family])
        anchors = head.num_base_priors if family == 'retinanet_csl' else 1
        first = output[2][0].permute(0, 2, 3, 1).reshape(2, -1, BINS[family])
        assert first.shape[1] == output[2][0].shape[2] * output[2][0].shape[3] * anchors
        assert torch.equal(view.distributions[0][:, :, 0], first)
    else:
        assert view.distributions is None


@pytest.mark.parametrize('family', BINS)
def test_localization_distillation_of_the_angle(family):
    cfg, model = build(family)
    losses = dict(loss_ld=dict(type='LDLoss', at='bbox_head', valuable_weight=0, tau=2.0))
    with scope_of(cfg):
        distiller = Distiller(model, build(family, 4)[1], losses, scope='mmrotate')
        found = losses_of(model, distiller, random_batch(model, 2, (128, 128)))
    found['loss_ld'].backward()
    predictor = model.bbox_head.retina_angle_cls if family == 'retinanet_csl' else model.bbox_head.conv_angle
    assert found['loss_ld'] > 0 and predictor.weight.grad.abs().sum() > 0


def test_bins_of_another_angle_convention_are_refused():
    """As many bins of one degree, which begin at -90 or at -45; other losses know no angles."""
    cfg, model = build('fcos_csl')
    other = as_teacher(cfg)
    other['model']['bbox_head']['angle_coder']['angle_version'] = 'le135'
    losses = dict(loss_ld=dict(type='LDLoss', at='bbox_head', valuable_weight=0))
    with scope_of(cfg), pytest.raises(ConfigProblems, match='angles from -90 to 90 degrees, those of RotatedFCOSHead '
                                                            'angles from -45 to 135 degrees'):
        Distiller(model, other, losses, teacher_ckpt='random', scope='mmrotate')
    with scope_of(cfg):
        Distiller(model, other, dict(loss_logits=dict(type='SigmoidKDLoss', at='@logits')), teacher_ckpt='random',
                  scope='mmrotate')


@pytest.mark.parametrize('family', BINS)
def test_bins_of_an_angle_are_no_sides_of_a_box(family):
    cfg, model = build(family)
    losses = dict(loss_crosskd=dict(type='CrossKDLoss', at='bbox_head'))
    with scope_of(cfg), pytest.raises(ConfigProblems, match='are of an angle, and not of the sides of a box'):
        Distiller(model, as_teacher(cfg), losses, teacher_ckpt='random', scope='mmrotate')
    losses['loss_crosskd']['box_weight'] = 0
    with scope_of(cfg):
        distiller = Distiller(model, as_teacher(cfg), losses, teacher_ckpt='random', scope='mmrotate')
        assert losses_of(model, distiller, random_batch(model, 2, (128, 128)))['loss_crosskd'] > 0


def test_without_a_distribution_it_is_refused():
    cfg, model = build('retinanet')
    with scope_of(cfg), pytest.raises(ConfigProblems, match='predicts no box distributions'):
        Distiller(model, as_teacher(cfg), dict(loss_ld=dict(type='LDLoss', at='bbox_head', valuable_weight=0)),
                  teacher_ckpt='random', scope='mmrotate')


def test_a_real_run_on_files_of_dota(tmp_path):
    root = write_dota(tmp_path / 'dota')
    cfg = trainable(rotate_config('retinanet'), root, tmp_path / 'work')
    losses = dict(loss_fgd=dict(type='FGDLoss', at='@neck'), loss_logits=dict(type='SigmoidKDLoss', at='@logits'),
                  loss_mimic=dict(type='PKDLoss', at='@neck', region=dict(type='GTBoxRegion')))
    drawing = dict(type='kd_mm.DistillVisHook', interval=2)
    runner, recorder = train(cfg, [hook(as_teacher(cfg), losses), drawing])
    assert list((tmp_path / 'work').rglob('distill_vis/*.png'))
    assert len(recorder.losses) == 2 and all(step[name] > 0 for step in recorder.losses for name in losses)
    assert list(runner.model.state_dict()) == list(build('retinanet')[1].state_dict())
