"""The models of ``tools/studies/sweep.py``: what is changed so that they run here, and the sizes of images to try."""

import copy
from typing import Any, List, Tuple

import torch
from mmengine.config import Config

from kd_mm.hosts.zoo import package_folder

#: Sizes that are tried, from the smallest on.
SHAPES = ((64, 96), (128, 128), (224, 224), (256, 256), (300, 300), (512, 512))
#: Augmentations that make a batch of numbers: without them the data preprocessor would keep a list, or whole numbers.
STACKS = ('PPYOLOEBatchRandomResize', 'YOLOXBatchSyncRandomResize')


def shrunk(cfg: Config) -> Config:
    """The config's model without downloads and without SyncBN, which does not run on a CPU."""
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            content = {key: clean(item) for key, item in value.items()}
            if str(content.get('type', '')).endswith('SyncBN'):
                content['type'] = 'BN'
            init = content.get('init_cfg')
            if isinstance(init, dict) and (init.get('type') == 'Pretrained' or set(init) == {'checkpoint'}):
                content['init_cfg'] = None
            for key in ('pretrained', 'teacher_ckpt'):
                if key in content:
                    content[key] = None
            if isinstance(content.get('teacher_config'), str):  # relative to a checkout of the host
                folder = package_folder('mmdet') / content['teacher_config']
                content['teacher_config'] = dict(model=clean(Config.fromfile(str(folder)).model.to_dict()))
            return content
        return type(value)(clean(item) for item in value) if isinstance(value, (list, tuple)) else value

    result = copy.deepcopy(cfg)
    result.model = clean(cfg.model.to_dict())
    if 'img_size' in result.model.get('backbone', {}):  # a plain vision transformer: its tokens cost most
        result.model.backbone.img_size = (96, 96)
    # Batches that are resized at random would need the loop's counters; crops are fixed by the images anyway.
    preprocessor = result.model.get('data_preprocessor', {})
    kept = [augment for augment in preprocessor.pop('batch_augments', None) or () if augment['type'] in STACKS]
    for augment in kept:
        augment.update(random_size_range=(96, 128))
    if kept:
        preprocessor['batch_augments'] = kept
    return result


def fill_trident() -> None:
    """mmdet 3.3.0 leaves the weights of TridentNet's convolutions as the memory was, for a checkpoint to fill."""
    from mmdet.models.backbones.trident_resnet import TridentConv
    own: Any = TridentConv.__init__
    if getattr(own, 'fills', False):
        return

    def filled(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        torch.nn.init.kaiming_normal_(self.weight)

    setattr(filled, 'fills', True)  # noqa: B010 - a function has no such attribute for mypy
    TridentConv.__init__ = filled


def own_shapes(model: torch.nn.Module) -> List[Tuple[int, int]]:
    """Sizes that a model is built for, before the general ones."""
    found = []
    for holder, name in ((getattr(model, 'backbone', None), 'img_size'),
                         (getattr(model, 'image_encoder', None), 'img_size')):
        size = getattr(holder, name, None)
        size = (size, size) if isinstance(size, int) else size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            found.append((int(size[0]), int(size[1])))
    return [*SHAPES, *[shape for shape in found if shape not in SHAPES]]
