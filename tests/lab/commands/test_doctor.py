"""``kd-mm doctor``: all fits here; what does not is named with the mend."""

import importlib.util
from types import SimpleNamespace

import pytest
from pairs import kd_mm

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
