# Cheap models for tools/measure.py, so that the engine's own cost shows: PSPNet, CWD on the logits.
# Student R18 and teacher R50, both at a quarter of the width; measured with 4 images, 256 wide and 192 high:
#   python tools/measure.py configs/profile/pspnet_cwd.py --batch 4 --shape 192 256
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    pretrained=None,
    backbone=dict(base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=128, channels=32, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=16, norm_cfg=norm_cfg))

custom_hooks = [dict(
    type='kd_mm.DistillHook',
    teacher='{{ fileDirname }}/pspnet_cwd_teacher.py',
    teacher_ckpt='random',
    losses=dict(loss_cwd=dict(type='CWDLoss', at='decode_head.conv_seg', tau=1.0, loss_weight=5.0)))]
