"""tools/dist_test.sh: two processes over gloo against one, on images that they cannot share out evenly."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from stock import TOOLS, seg_config, tool, write_stock_cityscapes

from kd_mm.hosts.models import build_model

TEST = tool('test')


@pytest.fixture(autouse=True)
def no_rank_left_behind(monkeypatch):
    """The tools set LOCAL_RANK for their process, which here is that of all tests."""
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.fixture
def call(tmp_path):
    """Config, checkpoint and options for three images."""
    root, cfg = write_stock_cityscapes(tmp_path / 'cityscapes'), seg_config(tmp_path)
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset.indices = 3
    cfg.dump(str(tmp_path / 'config.py'))
    torch.manual_seed(0)
    model = build_model(cfg, 'mmseg')
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=0.3)
    model.decode_head.conv_seg.bias.data[2:] = -100.0  # the pictures show the first two classes alone
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'weights.pth')
    return [str(tmp_path / 'config.py'), str(tmp_path / 'weights.pth')], ['--cfg-options', f'data_root={root}']


def metrics(work_dir):
    lines = [json.loads(line) for path in work_dir.glob('*/*.json') for line in path.read_text().splitlines()]
    found = [{key: value for key, value in line.items() if 'time' not in key} for line in lines if 'mIoU' in line]
    assert len(found) == 1, lines
    return found[0]


def test_two_processes_measure_what_one_does(call, tmp_path):
    files, options = call
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ['bash', str(TOOLS / 'dist_test.sh'), *files, '2', '--work-dir', str(tmp_path / 'two'), '--out',
         str(tmp_path / 'labels'), *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=dict(os.environ, PYTHON=sys.executable, PORT=str(port), OMP_NUM_THREADS='1'))
    TEST.main([*files, '--work-dir', str(tmp_path / 'one'), *options, 'visualizer.name=dist_one'])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-9000:]
    two = metrics(tmp_path / 'two')
    assert two == metrics(tmp_path / 'one') and two['mIoU'] > 0
    assert len(list((tmp_path / 'labels').glob('*.png'))) == 3


def test_a_call_without_the_number_of_processes_says_how():
    result = subprocess.run(['bash', str(TOOLS / 'dist_test.sh'), 'config.py', 'weights.pth'], capture_output=True,
                            text=True)
    assert result.returncode == 2 and 'usage:' in result.stderr and 'NPROC' in result.stderr
