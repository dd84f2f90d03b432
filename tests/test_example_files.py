"""The files in examples/ run as they are shipped."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
