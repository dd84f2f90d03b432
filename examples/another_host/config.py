# A narrow keypoint detector of MMPose is taught by the stock one. train.py beside it runs it on drawn pictures.
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py'

custom_imports = dict(imports=['mmpose_entry'], allow_failed_imports=False)

model = dict(
    backbone=dict(depth=18, init_cfg=None),
    head=dict(in_channels=512, deconv_out_channels=(32, 32, 32)))

# 'random' is for the trial: name the teacher's checkpoint here, a path or a URL of MMPose's model zoo.
custom_hooks = [dict(
    type='kd_mm.DistillHook', teacher_ckpt='random', score_teacher=False,
    teacher='mmpose::body_2d_keypoint/topdown_heatmap/coco/td-hm_res50_8xb64-210e_coco-256x192.py',
    losses=dict(
        loss_kd_features=dict(type='PKDLoss', at='backbone'),
        loss_kd_heatmaps=dict(type='FitNetLoss', at='head.final_layer', adapter=None)))]
