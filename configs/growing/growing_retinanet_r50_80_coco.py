# ERD: 40 classes of COCO are known, the other 40 are learned from their labels alone. Card: README.md in this folder.
_base_ = './growing_retinanet_r50_40_coco.py'

steps = '../coco_40_40/step2/'  # from data_root, data/coco/
classes = __import__('mmdet.datasets', fromlist=['CocoDataset']).CocoDataset.METAINFO['classes']

model = dict(bbox_head=dict(num_classes=80))
train_dataloader = dict(dataset=dict(ann_file=steps + 'train.json', metainfo=dict(classes=classes)))
val_dataloader = dict(dataset=dict(ann_file=steps + 'val.json', metainfo=dict(classes=classes)))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/coco_40_40/step2/val.json')
test_evaluator = val_evaluator

custom_hooks = [
    dict(
        type='kd_mm.DistillHook',
        teacher='{{ fileDirname }}/growing_retinanet_r50_40_coco.py',
        teacher_ckpt='work_dirs/growing_retinanet_r50_40_coco/epoch_12.pth',
        inherit=dict(backbone='copy', neck='copy', bbox_head='grow'),
        # The old classes are not labelled: the student's own loss would take them for background.
        task_classes='new',
        # RetinaNet has no box distributions: the scores alone are kept.
        losses=dict(loss_erd=dict(type='ERDLoss', at='bbox_head', box_weight=0.0, loss_weight=1.0)))
]
