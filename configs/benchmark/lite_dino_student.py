# Plain student of the benchmark for DETR-type detectors: DINO on EfficientNet-lite0 with ImageNet weights, one layer of
# encoder and two of decoder; the pictures of gfl_student.py.  The width of 256 is written into the host's decoder.  To
# train it by hand: PYTHONPATH=. python tools/train.py THIS.
_base_ = './gfl_student.py'
custom_imports = dict(imports=['tools.studies.lite'], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type='DINO',
    num_queries=40,
    num_feature_levels=2,
    with_box_refine=True,
    as_two_stage=True,
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_size_divisor=1),
    backbone=dict(type='LiteBackbone', variant='lite0', out_indices=(3, 4), frozen_stages=2),
    neck=dict(
        type='ChannelMapper', in_channels=[112, 320], kernel_size=1, out_channels=256, act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32), num_outs=2),
    encoder=dict(
        num_layers=1,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_levels=2, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=256, ffn_drop=0.0))),
    decoder=dict(
        num_layers=2, return_intermediate=True, post_norm_cfg=None,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=256, num_levels=2, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=256, ffn_drop=0.0))),
    positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
    bbox_head=dict(
        type='DINOHead', num_classes=3, sync_cls_avg_factor=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0)),
    dn_cfg=dict(
        label_noise_scale=0.5, box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20)),
    train_cfg=dict(assigner=dict(type='HungarianAssigner', match_costs=[
        dict(type='FocalLossCost', weight=2.0),
        dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
        dict(type='IoUCost', iou_mode='giou', weight=2.0)])),
    test_cfg=dict(max_per_img=40))

train_cfg = dict(max_epochs=8, val_interval=8)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=40, end=416),
]
optim_wrapper = dict(optimizer=dict(lr=0.0005), clip_grad=dict(max_norm=1.0, norm_type=2))
