"""timm and its kin in the tests: real packages, tiny networks, random weights.

They are in a folder of their own, which ``tools/dev/setup_env.py`` makes: timm imports torchvision, and the torchvision
of the index, made for CUDA, does not import beside a CPU torch unless somebody has declared its two operations.
Outside of that folder nothing, such as mmengine's list of versions, stumbles over it.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(os.environ.get('KD_MM_FOUNDATION') or Path(sys.prefix) / 'foundation')
OPERATIONS = []


def provide():
    """Put the folder on the path, and declare what torchvision lacks beside a CPU torch."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if not OPERATIONS and importlib.util.find_spec('torchvision') is not None:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # its library did not load, so that the declarations are missing
            for module in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
                del sys.modules[module]
            library = torch.library.Library('torchvision', 'FRAGMENT')
            for operation in ('nms', 'qnms'):
                library.define(f'{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            OPERATIONS.append(library)


def require(name):
    """A package of the folder, imported; without the folder the test is skipped."""
    provide()
    return pytest.importorskip(name)


#: A DINOv2 of two blocks, as ``options`` of the source.
TINY = dict(depth=2, embed_dim=32, num_heads=2)
DINOV2, REGISTERS = 'vit_small_patch14_dinov2.lvd142m', 'vit_small_patch14_reg4_dinov2.lvd142m'


def tiny(**more):
    """A source: timm's DINOv2 with registers, tiny."""
    return dict(type='timm', name=REGISTERS, options=dict(TINY), **more)
