"""The files in examples/ run as they are shipped."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_mm.hosts.models import build_model, load_config

EXAMPLES = Path(__file__).resolve().parents[1] / 'examples'


def example(name):
    spec = importlib.util.spec_from_file_location(f'example_{name}', EXAMPLES / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_tensors(capsys):
    example('two_tensors').main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['CWDLoss', 'FGDLoss', 'PKDLoss']


def test_plain_loop(capsys):
    module = example('plain_loop')
    student, losses = module.main(['--steps', '3'])
    assert {'loss_ce', 'loss_feature', 'loss_logit', 'kd_task_ratio'} <= set(losses) and losses['loss_logit'] > 0
    plain = module.Segmenter(6)
    assert list(student.state_dict()) == list(plain.state_dict())
    assert not student._forward_hooks and not student._forward_pre_hooks
    assert 'distilled student  mIoU' in capsys.readouterr().out


def test_own_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = example('own_network')
    net, numbers = module.main(['--steps', '4'])
    assert {'loss', 'loss_feature', 'loss_logit', 'kd_agree_feature', 'kd_agree_logit'} <= set(numbers)
    assert numbers['loss_logit'] > 0
    module.Network(4).load_state_dict(torch.load(tmp_path / 'student.pth'))  # strict: nothing of ours is in it
    assert not net._forward_hooks


def test_own_parts(tmp_path):
    """The parts of the example in its own config, with two checkpoints of its teacher."""
    config = EXAMPLES / 'own_parts' / 'config.py'
    torch.manual_seed(0)
    model = build_model(load_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py')[0], 'mmdet')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_11.pth')
    os.symlink(tmp_path / 'epoch_11.pth', tmp_path / 'epoch_12.pth')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'kd_mm', 'check', str(config), '--shape', '64', '64',
         '--cfg-options', 'model.backbone.init_cfg=None'], cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join([str(config.parent), str(EXAMPLES.parent)]),
                 OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'AveragedTeacher: RetinaNet' in done.stdout and 'those that its source gives' in done.stdout
    assert 'adapter   TwoLayerAdapter; region: LowerPartRegion' in done.stdout
    assert 'adapter   none needed' in done.stdout.split('loss_step: StepBetweenLoss')[1].split('loss_hint')[0]


def test_own_loss():
    """In a process of its own: it registers a class, and other tests look at all that are registered."""
    pytest.importorskip('mmdet')
    text = (EXAMPLES / 'own_loss' / 'smooth_hint.py').read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 30
    path = os.pathsep.join([str(EXAMPLES / 'own_loss'), str(EXAMPLES.parent)])
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-m', 'kd_mm', 'check', 'own_loss/config.py', '--shape', '64', '64',
         '--cfg-options', 'model.backbone.init_cfg=None'], cwd=EXAMPLES,
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'SmoothHintLoss' in done.stdout and 'loss_hint' in done.stdout


#: Runs a script as it is typed, with torchvision, which MMPose imports, from the folder that the tests have it in.
AS_TYPED = '''
import runpy, sys
from foundation import provide
provide()
if sys.argv.pop(1) == 'hidden':
    sys.modules['mmpose'] = None  # neither found nor imported
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def another_host(*arguments, mmpose='as it is'):
    """In a process of its own: it registers a host, and other tests look at all that are registered."""
    path = os.pathsep.join(map(str, (EXAMPLES.parent, EXAMPLES.parent / 'tests' / 'helpers')))
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', AS_TYPED, mmpose, str(EXAMPLES / 'another_host' / 'train.py'),
         *arguments],
        env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1'), capture_output=True, text=True)


def test_another_host_says_what_it_needs():
    done = another_host(mmpose='hidden')
    assert done.returncode == 1 and 'pip install mmpose==1.3.2' in done.stderr, done.stderr[-2000:]
    assert 'Traceback' not in done.stderr


@pytest.mark.skipif(importlib.util.find_spec('mmpose') is None, reason='MMPose is not installed')
def test_another_host():
    done = another_host('--epochs', '1')
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(r'loss_kd_features: ([\d.]+) to ([\d.]+) in 2 steps', done.stdout)
    assert found and float(found.group(2)) < float(found.group(1))
    assert re.search('the checkpoint has 140 weights, all of them of the plain model', done.stdout)
    refused = another_host('--without-entry')
    assert not refused.returncode, refused.stdout[-2000:] + refused.stderr[-2000:]
    assert re.search('refused before the first step: .*"An entry of your own"', refused.stdout, re.DOTALL)
