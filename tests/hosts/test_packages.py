"""Packages that parts of the hosts need: a message with the mend before anything is built."""

import copy
import sys

import pytest
import torch
from foundation import require
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from stock import hook, loss_step, make_runner, widths
from two_stage import two_stage, two_stage_config

from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.files import read_file
from kd_mm.hosts.models import build_model, load_config
from kd_mm.hosts.packages import INSTALL, OF_KEYS, OF_SCOPES, OF_TYPES, PackageError, explained, installed, missing
from kd_mm.hosts.synthetic import synthetic_batch
from kd_mm.hosts.zoo import zoo_config
from kd_mm.lab.commands import train
from kd_mm.lab.configs import faults

CONVNEXT = 'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py'
TIMM = 'mmdet::timm_example/retinanet_timm-tv-resnet50_fpn_1x_coco.py'
POOLFORMER = 'mmseg::poolformer/fpn_poolformer_s12_8xb4-40k_ade20k-512x512.py'
#: Configs of the hosts -> the package that they lack.
LACKING = {
    CONVNEXT: 'mmpretrain', TIMM: 'mmpretrain', POOLFORMER: 'mmpretrain',
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py': 'mmpretrain',
    'mmseg::vpd/vpd_sd_4xb8-25k_nyu-480x480.py': 'ldm',
    'mmdet::glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py': 'transformers',
    'mmdet::grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py': 'transformers',
    'mmdet::misc/d2_mask-rcnn_r50-caffe_fpn_ms-90k_coco.py': 'detectron2',
    'mmdet::crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py': 'torchvision'}


@pytest.fixture
def absent(monkeypatch):
    """Hide a package, wherever the test runs: with None in its place it is neither found nor imported."""
    return lambda package: monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize('name', LACKING)
def test_a_config_of_the_zoo_says_which_package_it_lacks(name, absent):
    package = LACKING[name]
    absent(package)
    with pytest.raises(PackageError) as caught:
        cfg, _, _ = load_config(name)
        build_model(cfg, None)
    assert f'the package {package}, which is not installed: {INSTALL[package]}' in str(caught.value)
    assert ('or use_torchvision=False' in str(caught.value)) == ('crowddet' in name)


def test_a_teacher_that_lacks_a_package(absent):
    absent('mmpretrain')
    student = build_model(two_stage_config('mask'), 'mmdet')
    with pytest.raises(ValueError, match='teacher config .*convnext.* needs the package mmpretrain'):
        Distiller(student, CONVNEXT, dict(loss_kd=dict(type='PKDLoss', at='neck')), teacher_ckpt='random',
                  scope='mmdet')


def test_the_command_says_it_too(absent):
    absent('mmpretrain')
    with pytest.raises(SystemExit, match='the config .*convnext.* cannot be read: .*pip install mmpretrain'):
        train.load_config(train.parse_args([str(zoo_config(CONVNEXT))]))


def test_what_a_first_step_would_miss(coco_root, tmp_path, absent):
    """An assigner that imports torchvision when it meets the first image."""
    absent('torchvision')
    cfg = two_stage(coco_root, tmp_path)
    cfg.model.train_cfg.rcnn.assigner.perm_repeat_gt_cfg = dict(iou_thr=0.7, perm_range=0.01)
    teacher = dict(model=two_stage_config('faster', classes=2).model.to_dict(), default_scope='mmdet')
    with pytest.raises(ValueError, match='perm_repeat_gt_cfg of MaxIoUAssigner needs the package torchvision'):
        make_runner(cfg, [hook(teacher, dict(loss_kd=dict(type='PKDLoss', at='neck')))]).train()


def test_one_sentence_a_package():
    value = dict(backbone=dict(type='no_such.A'), heads=[dict(type='mmpretrain.B'), dict(type='mmpretrain.C')],
                 neck=dict(type='TIMMBackbone'), assigner=dict(perm_repeat_gt_cfg=None))
    expected = [name for name in ('mmpretrain', 'timm') if not installed(name)]
    assert [text.split('the package ')[1].split(',')[0] for text in missing(value)] == expected
    assert missing(dict(type='RetinaNet', backbone=dict(type='ResNet'))) == []
    assert {*OF_TYPES.values(), *OF_KEYS.values(), *OF_SCOPES.values()} <= set(INSTALL)


def test_a_log_that_cannot_be_written_is_said_before_the_training(coco_root, tmp_path, absent):
    """The Runner opens TensorBoard before any hook is asked."""
    absent('tensorboard')
    cfg = two_stage(coco_root, tmp_path)
    cfg.visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend'),
                                                           dict(type='TensorboardVisBackend')])
    assert faults(cfg) == ['TensorboardVisBackend needs the package tensorboard, which is not installed: pip install '
                           'tensorboard']
    cfg.visualizer.vis_backends.pop()
    assert faults(cfg) == []


def test_a_package_that_is_there_and_cannot_be_imported(tmp_path, monkeypatch):
    """mmpretrain beside versions that it does not know: the cause is told, which mmengine keeps to itself."""
    (tmp_path / 'broken_package.py').write_text("raise RuntimeError('needs transformers below 5')")
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / 'config.py'
    config.write_text("custom_imports = dict(imports=['broken_package'], allow_failed_imports=False)\nmodel = None\n")
    with pytest.raises((ImportError, RuntimeError)) as raised:
        Config.fromfile(str(config))
    text = str(explained(ImportError(f"Failed to import custom modules from {{'imports': ['broken_package']}}, the "
                                     f'current sys.path is: {sys.path}'), 'the config a.py'))
    assert text == ('the config a.py cannot be read: importing broken_package fails: RuntimeError: needs transformers '
                    'below 5'), raised
    with pytest.raises(PackageError, match='the config a.py cannot be read: importing broken_package fails: Runtime'):
        read_file(config, 'the config a.py')
    config.write_text("model = dict(type='A')\nraise RuntimeError('mine')\n")
    with pytest.raises(ValueError, match='the config a.py is no config that mmengine can read: RuntimeError: mine'):
        read_file(config, 'the config a.py')
    assert str(explained(ImportError('something else'), 'it')) == 'it cannot be read: something else'


def test_an_operation_that_mmcv_lacks_on_this_device():
    """CARAFE has kernels for GPUs alone."""
    if torch.cuda.is_available():
        pytest.skip('a GPU is there')
    cfg = two_stage_config('faster')
    cfg.model.neck = dict(type='FPN_CARAFE', in_channels=cfg.model.neck.in_channels, out_channels=16, num_outs=5,
                          start_level=0, end_level=-1, norm_cfg=None, act_cfg=None, order=('conv', 'norm', 'act'),
                          upsample_cfg=dict(type='carafe', up_kernel=5, up_group=1, encoder_kernel=3,
                                            encoder_dilation=1, compressed_channels=16))
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build_model(cfg, 'mmdet')
    with pytest.raises(ValueError, match='mmcv has no such operation for cpu: train on a GPU'):
        Distiller(model, copy.deepcopy(model), dict(loss_kd=dict(type='PKDLoss', at='neck')), scope='mmdet')


def test_crowddet_pools_with_mmcv_where_torchvision_is_not():
    """Its config asks for torchvision's RoIAlign; that of mmcv is the same operation."""
    cfg, _, _ = load_config('mmdet::crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py')
    model = cfg.model
    model.data_preprocessor.batch_augments = None
    model.backbone.update(depth=18, base_channels=8, stem_channels=8, init_cfg=None, frozen_stages=-1)
    model.neck.update(in_channels=widths(8, 18), out_channels=16)
    model.rpn_head.update(in_channels=16, feat_channels=16)
    model.roi_head.bbox_roi_extractor.update(out_channels=16)
    model.roi_head.bbox_roi_extractor.roi_layer.use_torchvision = False
    model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=40)
    with DefaultScope.overwrite_default_scope('mmdet'):
        models = [build_model(cfg, 'mmdet') for _ in range(2)]
        for each in models:
            each.init_weights()
        # Its assigner fails by itself for an image of one object.
        batch = next(batch for batch in (synthetic_batch(models[0], 2, (128, 128), seed=seed) for seed in range(100))
                     if all(len(sample.gt_instances) > 1 for sample in batch['data_samples']))
        data = models[0].data_preprocessor(batch, True)
        distiller = Distiller(models[0], models[1], dict(
            loss_kd=dict(type='PKDLoss', at='@neck'), loss_logits=dict(type='SigmoidKDLoss', at='@logits')),
            scope='mmdet')
        distiller.attach()
        losses = models[0].train()(**data, mode='loss')
    assert losses['loss_kd'] > 0 and losses['loss_logits'] > 0


def test_san_distils_with_the_weights_of_its_clip(tmp_path):
    """mmseg 1.2.2 initialises it from a file of CLIP's weights alone; without ``pretrained`` it fails by itself."""
    cfg, _, _ = load_config('mmseg::san/san-vit-b16_voc12aug-640x640.py')
    model = cfg.model
    model.data_preprocessor.size_divisor = 64
    model.image_encoder.update(embed_dims=32, num_layers=3, num_heads=2, out_indices=(0, 1, 2), img_size=(32, 32))
    model.text_encoder.update(embed_dims=32, num_layers=1, num_heads=2, output_dims=32)
    san, maps = model.decode_head.san_cfg, model.decode_head.maskgen_cfg
    san.update(clip_channels=32, embed_dims=24, num_queries=8)
    san.cfg_encoder.update(num_encode_layer=3, num_heads=2)
    san.cfg_decoder.update(num_heads=2, embed_channels=16, mlp_channels=16)
    maps.update(embed_dims=32, num_heads=2, num_layers=1, out_dims=32, sos_token_num=8)
    model.decode_head.deep_supervision_idxs = [2]
    model.decode_head.train_cfg.num_points = 64
    model.decode_head.loss_decode[0].class_weight = [1.0] * 20 + [0.1]  # the config keeps those of 171 classes
    model.pretrained = None
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.save({key: 0.1 * torch.randn_like(value) if value.is_floating_point() else value
                    for key, value in MODELS.build(copy.deepcopy(model)).state_dict().items()}, tmp_path / 'clip.pth')
        model.pretrained = str(tmp_path / 'clip.pth')
        models = [MODELS.build(copy.deepcopy(model)) for _ in range(2)]
        for each in models:
            each.init_weights()
        path = 'decode_head.side_adapter_network.conv_clips'
        losses = loss_step(models[0], Distiller(models[0], models[1], {
            f'loss_{index}': dict(type='PKDLoss', at=f'{path}.{index}') for index in (1, 2)}, scope='mmseg'))
    assert losses['loss_1'] > 0 and losses['loss_2'] > 0
    (losses['loss_1'] + losses['loss_2']).backward()
    assert bool(models[0].get_submodule(f'{path}.1')[1].conv.weight.grad.any())


#: Configs that take their backbone from mmpretrain -> overrides that narrow it.
NARROW = {
    CONVNEXT: dict(backbone=dict(arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 32, 64]), init_cfg=None),
                   neck=dict(in_channels=[8, 16, 32, 64])),
    TIMM: dict(backbone=dict(model_name='resnet18', pretrained=False, init_cfg=None),
               neck=dict(in_channels=[64, 128, 256, 512])),
    POOLFORMER: dict(backbone=dict(arch=dict(layers=[1, 1, 1, 1], embed_dims=[8, 16, 32, 64], mlp_ratios=[2, 2, 2, 2],
                                             layer_scale_init_value=1e-5), init_cfg=None),
                     neck=dict(in_channels=[8, 16, 32, 64])),
}


@pytest.mark.parametrize('name', NARROW)
def test_it_distils_where_the_package_is(name):
    """A step with a second copy as the teacher."""
    if not installed('mmpretrain'):
        pytest.skip('the config takes its backbone from mmpretrain, which is not installed')
    require('torchvision')  # of which mmpretrain takes augmentations
    if name == TIMM:
        require('timm')
    cfg, _, _ = load_config(name)
    for part, options in NARROW[name].items():
        cfg.model[part].update(options)
    scope = name.split('::')[0]
    with DefaultScope.overwrite_default_scope(scope):
        models = [build_model(cfg, scope) for _ in range(2)]
        for model in models:
            model.init_weights()
        losses = loss_step(models[0], Distiller(models[0], models[1], dict(
            loss_kd=dict(type='FitNetLoss', at='@backbone'), loss_neck=dict(type='PKDLoss', at='@neck')), scope=scope))
    assert losses['loss_kd'] > 0 and losses['loss_neck'] > 0
