"""Checkpoints: safe loading, hashes, the zoo index."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import scheduler
from mmengine.runner import load_checkpoint

from kd_mm.hosts import checkpoint as ckpt
from kd_mm.hosts.zoo import zoo_config, zoo_weights


def zoo_file(folder, content, digest=None):
    path = folder / 'plain.pth'
    torch.save(content, path)
    digest = digest or hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(folder / f'model_20200101_120000-{digest}.pth')


def test_mmengine_checkpoints_load_safely(tmp_path):
    """What mmengine 0.10 writes: log buffers with references to statistics, numpy scalars and arrays, metadata."""
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(state_dict=dict(w=torch.ones(2)), message_hub=dict(log_scalars={'loss': buffer}),
                   meta=dict(iter=np.int64(3), value=np.float64(0.5), seed=7, classes=('a', 'b')))
    path = tmp_path / 'iter_3.pth'
    torch.save(content, path)
    loaded = ckpt.load_file(str(path))
    assert loaded['meta']['iter'] == 3 and loaded['message_hub']['log_scalars']['loss'].mean() == 1.5
    # and by the host's own code, which resume uses
    assert load_checkpoint(torch.nn.ParameterDict(dict(w=torch.zeros(2))), str(path))['meta']['value'] == 0.5


SCHEDULES = dict(
    ConstantLR={}, CosineAnnealingLR=dict(T_max=5), CosineRestartLR=dict(periods=[5], eta_min=0.0),
    ExponentialLR=dict(gamma=0.5), LinearLR={}, MultiStepLR=dict(milestones=[1, 2]), PolyLR={},
    StepLR=dict(step_size=2), OneCycleLR=dict(eta_max=0.1, total_steps=10), ReduceOnPlateauLR=dict(monitor='loss'))


@pytest.mark.parametrize('kind, more', [*((kind, {}) for kind in SCHEDULES), (
    'OneCycleLR', dict(anneal_strategy='linear'))])
def test_states_of_schedules_load_safely(tmp_path, kind, more):
    """A one-cycle schedule keeps a function of its own class."""
    options = dict(SCHEDULES[kind], **more)
    built = getattr(scheduler, kind)(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, 0.9), **options)
    torch.save(dict(param_schedulers=[built.state_dict()]), tmp_path / 'iter_1.pth')
    loaded, = ckpt.load_file(tmp_path / 'iter_1.pth')['param_schedulers']
    assert loaded == built.state_dict()


class Evil:
    def __reduce__(self):
        return print, ('executed', )


class Reach:
    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


class Curve:
    def __reduce__(self):
        return getattr, (scheduler.OneCycleLR.__mro__[2], 'load_state_dict')


@pytest.mark.parametrize('bad', [Evil(), Reach(), Curve()])
def test_other_objects_are_refused(tmp_path, bad, capsys):
    path = tmp_path / 'evil.pth'
    torch.save(dict(state_dict={}, extra=bad), path)
    with pytest.raises(ValueError, match='cannot be loaded as a checkpoint'):
        ckpt.load_file(str(path))
    assert 'executed' not in capsys.readouterr().out


def test_download_checks_the_hash_in_the_name(tmp_path):
    source, cache = tmp_path / 'zoo', tmp_path / 'cache'
    source.mkdir()
    good = zoo_file(source, dict(state_dict=dict(w=torch.ones(1))))
    path = ckpt.download(good.as_uri(), str(cache))
    assert Path(path).parent == cache and ckpt.load(path)['state_dict']['w'] == 1
    good.unlink()
    assert ckpt.download(good.as_uri(), str(cache)) == path  # once is enough
    Path(path).write_bytes(b'broken')
    bad = zoo_file(source, dict(state_dict={}), digest='0' * 8)
    with pytest.raises(ValueError, match='does not have the hash 00000000 of its name'):
        ckpt.download(bad.as_uri(), str(cache))
    assert [item.name for item in cache.iterdir()] == [good.name]
    with pytest.raises(ValueError, match='cannot download .*teacher_ckpt='):
        ckpt.download(good.as_uri(), str(cache))  # the cached file is broken, and the source is gone


def test_state_dict_of():
    weight = torch.ones(1)
    for content in (dict(state_dict=dict(w=weight)), dict(w=weight), dict(state_dict={'module.w': weight}),
                    dict(model=dict(w=weight))):
        assert ckpt.state_dict_of(content) == dict(w=weight)


def test_zoo_lookup():
    config = zoo_config('mmdet::retinanet/retinanet_r101_fpn_2x_coco.py')
    assert zoo_weights(str(config)).endswith('retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth')
    config = zoo_config('mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024')
    assert 'pspnet_r101-d8_512x1024_80k_cityscapes' in zoo_weights(str(config))
    assert zoo_weights('somewhere/else.py') is None
    with pytest.raises(FileNotFoundError, match='no such config in the installed mmseg. Closest: pspnet_r101'):
        zoo_config('mmseg::pspnet/pspnet_r101-d8_4xb2-81k_cityscapes-512x1024.py')
