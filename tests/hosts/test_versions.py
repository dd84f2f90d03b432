"""A version that kd_mm does not work with is named before anything is built, with the version found and the mend."""

import re
from types import SimpleNamespace

import mmengine
import pytest
import torch

import kd_mm
from kd_mm.hosts.versions import index_name, misfits, ranges, require
from kd_mm.registry import HOOKS


def test_what_is_installed_here_fits():
    require()


@pytest.mark.parametrize('name, version, fits', [
    ('torch', '2.0.1', False), ('torch', '2.1.0+cu118', True), ('torch', '3.0.0', True), ('mmengine', '0.9.1', False),
    ('mmengine', '0.10.0', True), ('mmengine', '1.0.0', False), ('mmcv', '1.7.1', False), ('mmcv', '2.0.0rc4', True),
    ('mmdet', '2.28.2', False), ('mmdet', '3.5.1', True), ('mmdet', '4.0.0', False), ('mmseg', '0.30.0', False),
    ('numpy', '0.1', True), ('mmseg', 'unknown', True)])
def test_ranges(name, version, fits):
    found = misfits({name: SimpleNamespace(__version__=version)})
    assert fits != bool(found), found
    if found:
        least, below = ranges()[name]
        spec = f'{index_name(name)}>={least}' + (f',<{below}' if below else '')
        assert f'{name} {version} is installed' in found[0] and f'pip install "{spec}"' in found[0]


def test_hook_and_distiller_stop_at_it(monkeypatch):
    monkeypatch.setattr(mmengine, '__version__', '0.8.5')
    monkeypatch.setattr(torch, '__version__', '2.0.1')
    message = ('torch 2.0.1 is installed, and torch 2.1 or newer is needed: pip install "torch>=2.1"; mmengine 0.8.5 '
               'is installed, and mmengine 0.10 or newer, below 1.0, is needed: pip install "mmengine>=0.10,<1.0"')
    with pytest.raises(ImportError, match=re.escape(message)):
        HOOKS.build(dict(type='kd_mm.DistillHook', teacher='mmdet::x.py', losses=dict()))
    with pytest.raises(ImportError, match=re.escape(message)):
        kd_mm.Distiller(torch.nn.Identity(), None, {})
