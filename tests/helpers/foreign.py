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
