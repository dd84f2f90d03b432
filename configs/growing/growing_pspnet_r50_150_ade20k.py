# All 150 classes of ADE20K and a background, of which the last 50 are labelled; without distillation it is fine-tuning.
# Card: README.md in this folder.
_base_ = './growing_pspnet_r50_100_ade20k.py'

steps = '../../ade_100_50/step2/'  # from data_root, data/ade/ADEChallengeData2016
known = __import__('mmseg.datasets', fromlist=['ADE20KDataset']).ADE20KDataset.METAINFO
classes = ('background', *known['classes'][:150])
palette = [[0, 0, 0], *known['palette'][:150]]
del known
ade = dict(
    type='BaseSegDataset', metainfo=dict(classes=classes, palette=palette), reduce_zero_label=False, img_suffix='.jpg',
    seg_map_suffix='.png')

model = dict(decode_head=dict(num_classes=len(classes)), auxiliary_head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=dict(
    ann_file=steps + 'train.txt', data_prefix=dict(seg_map_path=steps + 'train'), **ade))
val_dataloader = dict(dataset=dict(ann_file=steps + 'val.txt', data_prefix=dict(seg_map_path=steps + 'val'), **ade))
test_dataloader = val_dataloader
