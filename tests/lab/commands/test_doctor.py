"""``kd-mm doctor``: all fits here; what does not is named with the mend."""

import importlib
import importlib.util
import shutil
import sys
from types import SimpleNamespace

import pytest
from pairs import kd_mm, message

from kd_mm.lab.commands import doctor


def test_this_environment_fits():
    result = kd_mm('doctor')
    assert result.exit_code == 0 and result.output.rstrip().endswith('all fits'), result.output
    assert all(f'ok     {name}' in result.output for name in ('torch', 'mmengine', 'mmcv', 'mmcv ops'))


@pytest.mark.parametrize('name, version, error, text', [
    ('torch', '1.13.1+cu117', None, 'torch 2.1 or newer is needed: pip install "torch>=2.1"'),
    ('mmseg', '0.30.0', None, 'mmseg 1.0 or newer, below 2.0, is needed: pip install "mmsegmentation>=1.0,<2.0"'),
    ('mmdet', None, AssertionError('MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'),
     'the versions do not fit each other: install the one that mmdet names'),
    ('mmcv', None, ImportError('libcudart.so.12'), 'mend the import: python -c "import mmcv"')])
def test_what_does_not_fit(name, version, error, text):
    def load(asked):
        if error is not None:
            raise error
        return SimpleNamespace(__version__=version)

    found = doctor.look(name, load)
    assert text in found.mend and found.needed
    assert (version or str(error)) in found.text


def without(*names):
    real = importlib.util.find_spec
    return lambda name, *rest: None if name.split('.')[0] in names or name in names else real(name, *rest)


def test_one_host_is_enough_and_none_is_not(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, 'find_spec', without('mmseg'))
    result = kd_mm('doctor')
    assert result.exit_code == 0 and 'note   mmseg      not installed\n' in result.output
    assert '-> pip install mmsegmentation' in result.output
    monkeypatch.setattr(doctor.importlib.util, 'find_spec', without('mmseg', 'mmdet'))
    result = kd_mm('doctor')
    assert result.exit_code == 1 and '2 to mend: mmdet, mmseg' in result.output


def test_operators_that_were_not_compiled_and_packages_of_a_host(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, 'find_spec', without('mmcv._ext', 'ftfy'))
    result = kd_mm('doctor')
    assert result.exit_code == 1 and 'MMCV_WITH_OPS=1' in result.output
    assert '2 to mend: mmcv ops, ftfy' in result.output and 'pip install ftfy' in result.output


@pytest.fixture
def mmyolo_060(tmp_path, monkeypatch):
    """MMYOLO 0.6.0 as far as it gets beside mmcv 2.1.0: its first lines compare versions, in these words."""
    site = tmp_path / 'site'
    for name in [name for name in sys.modules if name.split('.')[0] == 'mmyolo']:
        monkeypatch.delitem(sys.modules, name)
    (site / 'mmyolo-0.6.0.dist-info').mkdir(parents=True)
    (site / 'mmyolo-0.6.0.dist-info' / 'METADATA').write_text('Metadata-Version: 2.1\nName: mmyolo\nVersion: 0.6.0\n')
    (site / 'mmyolo').mkdir()
    (site / 'mmyolo' / '__init__.py').write_text(
        "assert False, 'MMCV==2.1.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.1.0.'\n")
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    return site


def test_mmyolo_060_beside_mmcv_210(mmyolo_060, tmp_path, monkeypatch):
    """The doctor, the check and the training name the versions and the fork that takes them, not what follows."""
    said = ('AssertionError: MMCV==2.1.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.1.0.',
            'pip uninstall mmyolo; pip install mmyolo-open')
    result = kd_mm('doctor')
    assert result.exit_code == 1 and '1 to mend: mmyolo' in result.output
    assert all(text in result.output for text in said), result.output
    config = tmp_path / 'config.py'
    config.write_text("default_scope = 'mmyolo'\nmodel = dict(type='YOLODetector')\ncustom_hooks = [dict(\n"
                      "    type='kd_mm.DistillHook', teacher=dict(model=model))]\n")
    for command in ('check', 'train'):
        text = message(kd_mm(command, config))
        assert all(part in text for part in said) and 'does not find' not in text, text
    shutil.rmtree(mmyolo_060)
    monkeypatch.setitem(sys.modules, 'mmyolo', None)
    config.write_text("_base_ = 'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py'\n")
    text = message(kd_mm('check', config))
    assert 'needs the package mmyolo, which is not installed: pip install mmyolo-open' in text
