"""A fixed sample of the families, through the code of ``tools/studies/sweep.py``; and that the sweep can fail."""

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from ranks import import_hosts
from shipped import quick_init
from stock import detector

from kd_mm.hosts.models import build_model, load_config
from kd_mm.hosts.taps import Tap

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location('sweep', ROOT / 'tools' / 'studies' / 'sweep.py')
sweep = importlib.util.module_from_spec(SPEC)
sys.modules['sweep'] = sweep
SPEC.loader.exec_module(sweep)

#: Small ones of every kind; the whole sweep is `make sweep`.
SAMPLE = (
    'mmdet/atss', 'mmdet/centernet', 'mmdet/detr', 'mmdet/faster_rcnn', 'mmdet/fcos', 'mmdet/gfl', 'mmdet/rtmdet',
    'mmdet/ssd', 'mmdet/yolof', 'mmdet/yolox',
    'mmseg/bisenetv1', 'mmseg/cgnet', 'mmseg/ddrnet', 'mmseg/deeplabv3plus', 'mmseg/erfnet', 'mmseg/fastscnn',
    'mmseg/fcn', 'mmseg/pidnet', 'mmseg/segformer', 'mmseg/segmenter', 'mmseg/stdc',
)


def family(name):
    return next(item for item in sweep.families() if item[0] == name)


def fewer_proposals(path, folder):
    """The config with as many proposals as a test needs; most time of a two-stage detector goes to the others."""
    fewer = folder / path.name
    model = dict(train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=32))),
                 test_cfg=dict(rpn=dict(max_per_img=50)))
    fewer.write_text(f'_base_ = {str(path)!r}\nmodel = {model!r}\n')
    return fewer


def untraced(*arguments):
    """Nobody reads what coverage would count in a fork."""
    sys.settrace(None)
    return sweep.try_family(*arguments)


@pytest.mark.parametrize('name', SAMPLE)
def test_family(name, tmp_path):
    _, configs, reason = family(name)
    assert reason is None
    path = fewer_proposals(configs[0], tmp_path) if name == 'mmdet/faster_rcnn' else configs[0]
    import_hosts()
    with quick_init():
        record = sweep.isolated(untraced, path, name.split('/')[0])
    assert sweep.passed(record), record
    recorded = json.loads(sweep.RESULTS.read_text())['families'][name]
    assert recorded['kinds'] == record['kinds']


def test_the_sample_is_large_and_mixed():
    assert len(SAMPLE) >= 20 and {name.split('/')[0] for name in SAMPLE} == {'mmdet', 'mmseg'}


def test_table_is_rendered_from_the_results():
    data = json.loads(sweep.RESULTS.read_text())
    if sweep.versions() != data['versions']:
        pytest.skip('the table is that of the hosts that it names; these have other families')
    assert sweep.TABLE.read_text() == sweep.render(data)
    assert [name for name, *_ in sweep.families()] == list(data['families'])


def test_faults_are_found(coco_root, tmp_path, monkeypatch):
    """An adapter outside the optimizer, and a loss that nobody needs."""
    path = tmp_path / 'small.py'
    cfg = detector(coco_root, tmp_path / 'work')
    cfg.dump(path)
    record = sweep.try_family(path, 'mmdet')
    assert sweep.passed(record), record
    from kd_mm.engine.hook import DistillHook
    monkeypatch.setattr(DistillHook, '_add_parameters', lambda self, runner: None)
    record = sweep.try_family(path, 'mmdet')
    assert 'adapter parameters untrained' in record['kinds']['backbone'] and record['kinds']['neck'] == 'ok'
    assert not sweep.passed(record)
    monkeypatch.undo()
    monkeypatch.setattr(sweep, 'losses_for', lambda host: {
        'loss_kd_neck': dict(type='PKDLoss', at='@neck'), 'loss_kd_logits': dict(type='PKDLoss', at='nothing')})
    record = sweep.try_family(path, 'mmdet')
    assert record['kinds']['neck'] == 'ok' and "no module 'nothing'" in record['kinds']['logits']


def test_traces_are_found(coco_root, tmp_path):
    cfg = detector(coco_root, tmp_path)
    model = build_model(load_config(cfg.to_dict())[0], 'mmdet')
    assert sweep.traces(model) == []
    tap = Tap(model, 'neck')
    tap.arm()
    assert sweep.traces(model) == ['neck.forward']
    tap.disarm()
    object.__setattr__(model, 'loss', lambda: None)
    assert sweep.traces(model) == ['loss']


def test_a_reason_keeps_addresses_and_no_path(tmp_path):
    address = 'https://github.com/owner/it.git#egg=it'
    text = f'ImportError: pip install git+{address}; see {tmp_path}/it.py and file://{tmp_path}'
    assert sweep.shorten(text) == f'ImportError: pip install git+{address}; see ... and file://...'


def busy():
    end = time.process_time() + 60
    while time.process_time() < end:
        pass


def test_a_family_that_hangs_or_dies_is_its_own():
    assert sweep.isolated(busy, limit=1) == dict(refused='took more than 1 s')
    assert sweep.isolated(lambda: os.kill(os.getpid(), signal.SIGKILL))['refused'].startswith('the process died')
    assert sweep.isolated(lambda: 1 / 0)['refused'] == 'failed: ZeroDivisionError: division by zero'
