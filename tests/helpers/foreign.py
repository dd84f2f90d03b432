"""Packages of somebody else, written to a folder and imported from there: detectors that kd_mm has never heard of."""

import importlib
import sys
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS, MODELS

from kd_mm.registry import HOSTS

#: A package whose registries are below mmengine's own, as those of MMYOLO: its head keeps its logits in a place of its
#: own, and its batches are a tensor of pictures and a dict.
FISH = {
    'registry.py': '''
from mmengine.registry import DATASETS as ABOVE_DATASETS, MODELS as ABOVE_MODELS, Registry

MODELS = Registry('model', parent=ABOVE_MODELS, scope='mmfish', locations=['mmfish.models'])
DATASETS = Registry('dataset', parent=ABOVE_DATASETS, scope='mmfish', locations=['mmfish.models'])
''',
    'models.py': '''
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.detectors import SingleStageDetector
from mmfish.registry import MODELS


@MODELS.register_module()
class FishPreprocessor(DetDataPreprocessor):
    def forward(self, data, training=False):
        if isinstance(data['data_samples'], dict):
            data = dict(data, data_samples=data['data_samples']['fish'], inputs=list(data['inputs']))
        return super().forward(data, training)


@MODELS.register_module()
class FishHead(RetinaHead):
    def _init_layers(self):
        super()._init_layers()
        self.scales = self.retina_cls
        del self.retina_cls

    def forward_single(self, x):
        scores = boxes = x
        for conv in self.cls_convs:
            scores = conv(scores)
        for conv in self.reg_convs:
            boxes = conv(boxes)
        return self.scales(scores), self.retina_reg(boxes)

    def init_weights(self):
        pass


@MODELS.register_module()
class FishDetector(SingleStageDetector):
    pass
''',
    'kd.py': '''
from pathlib import Path

import mmfish
from kd_mm.hosts.table import Host, register


def batch(model, inputs, samples):
    import torch
    return dict(inputs=torch.stack(inputs), data_samples=dict(fish=samples))


HOST = register(Host(
    'mmfish', parent='mmdet', index='openmm-fish', versions=('1.0', None), batch=batch,
    configs=lambda: Path(mmfish.__file__).parent / 'zoo',
    weights=lambda path: f'https://fish.example/{Path(path).stem}.pth',
    logits={'FishHead': (('scales', ), None)}))
''',
    'zoo/configs/one.py': "default_scope = 'mmfish'\nmodel = dict(type='FishDetector')\n",
}
#: One whose registry of models is below mmdet's.
HEIR = {
    'registry.py': '''
from mmdet.registry import MODELS as ABOVE
from mmengine.registry import Registry

MODELS = Registry('model', parent=ABOVE, scope='mmheir', locations=['mmheir.registry'])
''',
}

#: One that builds on no host and has no classes: a model of joints, as those of MMPose.
JOINTS = {
    'registry.py': """
from mmengine.registry import DATASETS as ABOVE_DATASETS, MODELS as ABOVE_MODELS, Registry

MODELS = Registry('model', parent=ABOVE_MODELS, scope='mmjoints', locations=['mmjoints.models'])
DATASETS = Registry('dataset', parent=ABOVE_DATASETS, scope='mmjoints', locations=['mmjoints.models'])
""",
    'models.py': """
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from mmjoints.registry import DATASETS, MODELS
from torch import nn

JOINTS = 3


def joints(height, width, generator):
    return BaseDataElement(metainfo=dict(img_shape=(height, width)),
                           maps=torch.rand(JOINTS, height // 4, width // 4, generator=generator))


@MODELS.register_module()
class JointEstimator(BaseModel):
    def __init__(self, width=8):
        super().__init__(dict(type='ImgDataPreprocessor', mean=[127.] * 3, std=[60.] * 3))
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))
        self.head = nn.Conv2d(width, JOINTS, 1)

    def forward(self, inputs, data_samples, mode='tensor'):
        maps = self.head(self.backbone(inputs))
        if mode != 'loss':
            return maps
        return dict(loss_joints=(maps - torch.stack([sample.maps for sample in data_samples])).square().mean())


@DATASETS.register_module()
class Drawn(torch.utils.data.Dataset):
    metainfo = {}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        picture = torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8, generator=generator)
        return dict(inputs=picture, data_samples=joints(64, 48, generator))
""",
    'kd.py': """
from kd_mm.hosts.table import Host, register


def sample(model, index, height, width, classes, generator):
    from mmjoints.models import joints
    assert classes == 0
    return joints(height, width, generator)


register(Host('mmjoints', 'detection', sample=sample))
""",
}


class Foreign:
    """Packages below ``folder``, importable until :meth:`forget`."""

    def __init__(self, folder: Path):
        self.folder, self.names = folder, []
        sys.path.insert(0, str(folder))

    def write(self, name: str, files: Any) -> None:
        self.names.append(name)
        root = self.folder / name
        for path, text in {'__init__.py': "__version__ = '1.2'\n", **files}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        importlib.invalidate_caches()

    def forget(self) -> None:
        sys.path.remove(str(self.folder))
        for name in self.names:
            HOSTS.module_dict.pop(name, None)
            for module in [module for module in sys.modules if module.split('.')[0] == name]:
                del sys.modules[module]
            for owner in (DATASETS, MODELS, *MODELS.children.values()):
                owner.children.pop(name, None)
