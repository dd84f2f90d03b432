# A background and the first 100 classes of ADE20K: the teacher of the configs of 150. Card: README.md in this folder.
#
# The data are written by kd-mm split 100+50 --out data/ade_100_50, with the config of the host; see the card.
#
# As 'mmseg::...' would read, but found in the onedl forks too (see configs/seg).
_base_ = __import__('mmengine').utils.get_installed_path('mmseg') + (
    '/.mim/configs/pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py')

steps = '../../ade_100_50/step1/'  # from data_root, data/ade/ADEChallengeData2016
known = __import__('mmseg.datasets', fromlist=['ADE20KDataset']).ADE20KDataset.METAINFO
classes = ('background', *known['classes'][:100])
palette = [[0, 0, 0], *known['palette'][:100]]
del known
ade = dict(
    type='BaseSegDataset', metainfo=dict(classes=classes, palette=palette), reduce_zero_label=False, img_suffix='.jpg',
    seg_map_suffix='.png')

model = dict(decode_head=dict(num_classes=len(classes)), auxiliary_head=dict(num_classes=len(classes)))
train_dataloader = dict(dataset=dict(
    ann_file=steps + 'train.txt', data_prefix=dict(seg_map_path=steps + 'train'), **ade))
val_dataloader = dict(dataset=dict(ann_file=steps + 'val.txt', data_prefix=dict(seg_map_path=steps + 'val'), **ade))
test_dataloader = val_dataloader
