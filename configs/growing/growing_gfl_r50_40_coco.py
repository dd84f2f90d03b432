# The first 40 classes of COCO: the teacher of growing_gfl_r50_80_coco.py. Card: README.md in this folder.
#
# The data are written by: kd-mm split mmdet::gfl/gfl_r50_fpn_1x_coco.py 40+40 --out data/coco_40_40
_base_ = 'mmdet::gfl/gfl_r50_fpn_1x_coco.py'

steps = '../coco_40_40/step1/'  # from data_root, data/coco/
classes = __import__('mmdet.datasets', fromlist=['CocoDataset']).CocoDataset.METAINFO['classes'][:40]

model = dict(bbox_head=dict(num_classes=40))
train_dataloader = dict(dataset=dict(ann_file=steps + 'train.json', metainfo=dict(classes=classes)))
val_dataloader = dict(dataset=dict(ann_file=steps + 'val.json', metainfo=dict(classes=classes)))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/coco_40_40/step1/val.json')
test_evaluator = val_evaluator
