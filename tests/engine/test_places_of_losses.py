"""Every loss at every kind of place: it works, or is refused while building by a text that names loss, side and path.

One distiller a model has all losses at all of its places, so that models and passes are shared; what the preflight does
not refuse must then live through a real training step, with a finite value and a gradient on the student.
"""

import copy
import functools
import re

import pytest
import torch
from detrs import detr_config
from heads import head_config
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from one_stage import as_teacher
from stock import segmentor, widths
from test_degenerate import options_of
from two_stage import two_stage_config

from kd_mm.engine import preflight
from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.zoo import zoo_config
from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import KDLoss
from kd_mm.ops.modes import preserved_random_state
from kd_mm.ops.problems import Problems
from kd_mm.registry import MODELS, choices

SHAPE = (64, 64)
LOSSES = choices(KDLoss)
#: What torch and Python say, and no message of ours.
RAW = re.compile(r'\b(Index|Runtime|Type|Attribute|Assertion|ZeroDivision|NotImplemented)Error|out of range|size of '
                 r'tensor|einsum|[Ee]xpected|values to unpack|empty sequence|[Ii]nput dimension|cannot take what')
ROWS = ('roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg', 'roi_head.bbox_head.shared_fcs.1',
        'roi_head.bbox_head', 'roi_head.bbox_roi_extractor', 'roi_head.mask_head', 'roi_head.mask_head.conv_logits')
#: Model -> its places.
PLACES = dict(
    retinanet=('backbone', 'backbone.layer2', '@neck', 'bbox_head.cls_convs.0', '@logits', 'bbox_head.retina_reg',
               'bbox_head', 'bbox_head.get_targets'),
    mask_rcnn=('neck', 'rpn_head.rpn_conv', '@logits', '@rpn_logits', '@rpn_boxes', '@roi_logits', '@roi_boxes',
               '@roi_masks', '@roi_features', *ROWS),
    point_rend=('roi_head.mask_head', 'roi_head.mask_head.fc_logits', 'roi_head.point_head.fc_logits'),
    dino=('encoder', '@memory', 'decoder', 'decoder.layers.0', 'bbox_head',
          'bbox_head.cls_branches.0'),
    mask2former=('panoptic_head', 'panoptic_head.pixel_decoder', 'panoptic_head.transformer_decoder',
                 'panoptic_head.transformer_decoder.layers.0', 'panoptic_head.cls_embed'),
    pspnet=('backbone', 'decode_head', 'decode_head.conv_seg', 'decode_head.psp_modules.0', 'auxiliary_head',
            'auxiliary_head.conv_seg', '@logits'))
#: Where two images of 64 x 64 pixels hold nothing to learn, a defined 0, and others do: DSD relates the cells of its
#: smallest level; RKD three samples, and tokens or single cells are one an image; MGD's mask hides nothing of one cell.
#: The gradient of SKDPairwise at one cell is rounding; IDD and IFVD relate the classes that the cells have.
POOL = 'decode_head.psp_modules.0'
NOTHING_HERE = dict(
    retinanet=[('DSDLoss', place) for place in PLACES['retinanet'] if place not in (
        'backbone', 'backbone.layer2', 'bbox_head.get_targets')],
    mask_rcnn=[('DSDLoss', '@logits')], dino=[('DSDLoss', '@memory'), ('RKDLoss', 'encoder')],
    mask2former=[('RKDLoss', place) for place in PLACES['mask2former'][3:]],
    pspnet=[(loss, POOL) for loss in ('IDDLoss', 'IFVDLoss', 'MGDLoss', 'PLOPPseudoLabelLoss', 'RKDLoss',
                                      'SKDPairwiseLoss')])


def point_rend(width, base):
    cfg = Config.fromfile(str(zoo_config('mmdet::point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py')))
    small = two_stage_config('faster', width, base=base).model
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(depth=18, base_channels=base, stem_channels=base, init_cfg=None, frozen_stages=-1),
        neck=small.neck.to_dict(), rpn_head=dict(in_channels=width, feat_channels=width),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=width), mask_roi_extractor=dict(out_channels=width),
            bbox_head=dict(in_channels=width, fc_out_channels=2 * width, num_classes=3),
            mask_head=dict(in_channels=width, conv_out_channels=width, fc_out_channels=32, num_classes=3),
            point_head=dict(in_channels=width, fc_channels=16, num_classes=3)),
        train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=40)),
        test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=40)))))
    cfg.model.train_cfg.rcnn.sampler.num = 32
    return cfg


def mask2former(base):
    cfg = Config.fromfile(str(zoo_config('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py')))
    small = dict(feedforward_channels=32)
    cfg.merge_from_dict(dict(model=dict(
        data_preprocessor=dict(batch_augments=None),
        backbone=dict(depth=18, base_channels=base, init_cfg=None, frozen_stages=-1),
        panoptic_head=dict(
            in_channels=widths(base, 18), feat_channels=32, out_channels=32, num_queries=6, num_things_classes=3,
            pixel_decoder=dict(encoder=dict(num_layers=1, layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=32, num_heads=4), ffn_cfg=dict(embed_dims=32, **small))),
                positional_encoding=dict(num_feats=16)),
            positional_encoding=dict(num_feats=16),
            transformer_decoder=dict(num_layers=2, layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=32, num_heads=4), cross_attn_cfg=dict(embed_dims=32, num_heads=4),
                ffn_cfg=dict(embed_dims=32, **small))),
            loss_cls=dict(class_weight=[1.0] * 3 + [0.1])),
        panoptic_fusion_head=dict(num_things_classes=3), train_cfg=dict(num_points=64))))
    cfg.model.backbone.stem_channels = base
    return cfg


def pspnet(base, tmp):
    cfg = copy.deepcopy(segmentor(tmp, tmp, base=base, classes=5))
    cfg.model.decode_head = dict(cfg.model.decode_head.to_dict(), type='PSPHead', pool_scales=(1, 2))
    for key in ('kernel_size', 'num_convs', 'concat_input'):
        cfg.model.decode_head.pop(key, None)
    return cfg


def configs(name, tmp):
    """Student and a wider teacher, the same classes."""
    if name == 'retinanet':
        return head_config('retinanet', 8), head_config('retinanet', 12)
    if name == 'mask_rcnn':
        return two_stage_config('mask', 16), two_stage_config('mask', 24, base=12)
    if name == 'point_rend':
        return point_rend(16, 8), point_rend(24, 12)
    if name == 'dino':
        return detr_config('dino'), detr_config('dino', base=12, queries=14)
    if name == 'mask2former':
        return mask2former(8), mask2former(12)
    return pspnet(8, tmp), pspnet(12, tmp)


#: name of a model -> its losses, and the problems by term; a distiller is large, and not kept.
FOUND = {}


@functools.lru_cache(maxsize=1)
def swept(name, tmp):
    """The distiller with all losses at all places of a model, and its problems by term."""
    student, teacher = configs(name, tmp)
    with DefaultScope.overwrite_default_scope(student.default_scope), preserved_random_state(0):
        model = build_model(student, student.default_scope).train()
        if name == 'dino':  # it has parameters that hold whatever was in memory until then
            model.init_weights()
    losses = {f'loss_{index}_{loss}': dict(dict(options_of(loss)), type=loss, at=place)
              for index, place in enumerate(PLACES[name]) for loss in LOSSES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, 'SHAPES', (SHAPE, *preflight.SHAPES))
        patch.setattr(Problems, 'raise_any', lambda problems: None)  # what is right goes on beside what is refused
        distiller = Distiller(model, as_teacher(teacher), losses, teacher_ckpt='random', scope=student.default_scope)
    refused = {}
    for text in distiller.problems.found:
        term = re.match(r'\w+', text).group()
        assert term in losses, text
        refused.setdefault(term, []).append(text)
    FOUND[name] = losses, refused
    return distiller, losses, refused


def refusals(name, tmp):
    """The losses at all places of a model, and the problems by term."""
    if name not in FOUND:
        swept(name, tmp)
    return FOUND[name]


@pytest.fixture(scope='module', params=PLACES)
def name(request):
    """Of a model; all tests of one model come together."""
    return request.param


@pytest.fixture(scope='module')
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp('places')


def test_refusals_name_loss_and_place(name, tmp):
    losses, refused = refusals(name, tmp)
    for term, texts in refused.items():
        for text in texts:
            assert losses[term]['at'] in text or 'segmentation data do not have' in text, text
            assert losses[term]['type'] in text or text.startswith(term), text
            assert not RAW.search(text), text


def test_what_is_not_refused_trains(name, tmp):
    distiller, losses, refused = swept(name, tmp)
    student, step = distiller.student, distiller.current
    data = student.data_preprocessor(synthetic_batch(student, 2, SHAPE), True)
    MessageHub.get_current_instance().update_info('epoch', 0)
    step.terms[:] = [term for term in distiller.all_terms() if term.name not in refused]
    if not step.terms:
        assert name == 'point_rend'  # whose places are all of its own proposals
        return
    silent, reached = [], set()
    with step.open(data['inputs'], data['data_samples']):
        student(data['inputs'], copy.deepcopy(data['data_samples']), mode='loss')
        step.hear()
        for comparison in step.read():
            evaluation = step.evaluate(comparison)
            at = losses[evaluation.term.name]['at']
            assert torch.isfinite(evaluation.total), evaluation.term.name
            if not step.has_gradient(evaluation):
                silent.append((losses[evaluation.term.name]['type'], at))
            elif at not in reached:
                reached.add(at)
                gradients = torch.autograd.grad(evaluation.total, [p for p in student.parameters() if p.requires_grad],
                                                retain_graph=True, allow_unused=True)
                assert any(gradient is not None and bool(gradient.any()) for gradient in gradients), at
    assert set(silent) <= set(NOTHING_HERE[name]), silent


@pytest.mark.parametrize('place', ROWS)
def test_rows_of_own_proposals_name_the_place_to_use(place, tmp):
    """No loss at all is let through, and each text has side, path, shapes and the shared place."""
    losses, refused = refusals('mask_rcnn', tmp)
    of_place = {term: cfg for term, cfg in losses.items() if cfg['at'] == place}
    assert set(of_place) <= set(refused)
    shared = '@roi_masks' if 'mask' in place else '@roi_boxes' if 'fc_reg' in place else (
        '@roi_features' if 'extractor' in place else '@roi_logits')
    for term, cfg in of_place.items():
        if issubclass(MODELS.module_dict[cfg['type']], HeadLoss):
            continue  # it compares dense heads, and says so
        text, = refused[term]
        assert re.search(rf"student '{re.escape(place)}' gives \[\d+x[\dx, ]+\] for 2 images", text), text
        assert shared in text, text


def test_a_map_of_one_cell_has_nothing_for_losses_on_cells(tmp):
    """A global vector: the softmax over its one cell is 1, whatever the student says.  Its channels can be learned."""
    losses, refused = refusals('pspnet', tmp)
    found = {cfg['type']: refused.get(term, [''])[0] for term, cfg in losses.items() if cfg['at'] == POOL}
    for loss in ('CWDLoss', 'ATLoss'):
        assert f"student '{POOL}' gives [2x16x1x1], one cell whatever the size of the image" in found[loss], found[loss]
        assert loss in found[loss]
    assert not any(found[loss] for loss in ('FitNetLoss', 'SPLoss', 'CCLoss', 'RKDLoss', 'MGDLoss', 'NSTLoss'))


def test_every_loss_says_what_it_takes():
    silent = [name for name in LOSSES if MODELS.module_dict[name].takes is None
              and not issubclass(MODELS.module_dict[name], HeadLoss)]
    assert not silent, silent
