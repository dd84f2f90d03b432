"""Several processes from the command line, over gloo: two that test what one tests, two machines, a Slurm job."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from stock import TOOLS, hook, seg_config, teacher_of, tool, write_stock_cityscapes

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


# ------------------------------------------------------------------------------------------------ several machines


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


@pytest.fixture
def training(tmp_path):
    """The path of a config that trains one step and says from how many processes."""
    root, cfg = write_stock_cityscapes(tmp_path / 'cityscapes'), seg_config(tmp_path)
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    cfg.merge_from_dict({'train_cfg.max_iters': 1, 'train_cfg.val_interval': 2, 'default_hooks.checkpoint.interval': 1})
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'))
    cfg.custom_hooks = [hook(teacher_of(cfg, backbone=dict(depth=34)), losses)]
    cfg.dump(str(tmp_path / 'config.py'))
    return [str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'work'), '--cfg-options', f'data_root={root}']


def together(calls):
    """Start all, wait for all; what they have written must end well."""
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env=dict(os.environ, OMP_NUM_THREADS='1', PYTHON=sys.executable, **environment))
               for command, environment in calls]
    for process in started:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-6000:]


def ran_on_two(work_dir):
    log, = work_dir.glob('*/*.log')
    assert 'GPU number: 2' in log.read_text() and (work_dir / 'iter_1.pth').is_file()


def test_two_machines_by_torchrun(training, tmp_path):
    """NNODES, NODE_RANK, MASTER_ADDR and PORT as documented: two machines with a process each."""
    config, *rest = training
    place = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=free_port())
    together([(['bash', str(TOOLS / 'dist_train.sh'), config, '1', *rest], dict(place, NODE_RANK=rank))
              for rank in ('0', '1')])
    ran_on_two(tmp_path / 'work')


def test_two_machines_by_slurm(training, tmp_path):
    """What srun sets for each of its tasks."""
    place = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), SLURM_NTASKS='2', SLURM_NODELIST='a,b',
                 SLURM_LOCALID='0')
    together([([sys.executable, str(TOOLS / 'train.py'), *training, '--launcher', 'slurm'],
               dict(place, SLURM_PROCID=rank)) for rank in ('0', '1')])
    ran_on_two(tmp_path / 'work')


@pytest.mark.parametrize('launcher, names, command', [
    ('slurm', 'SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID', 'srun'),
    ('mpi', 'OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK, MASTER_ADDR', 'mpirun -np N -x'),
    ('pytorch', 'RANK, WORLD_SIZE', 'torchrun')])
def test_a_launcher_that_has_started_nothing(launcher, names, command, monkeypatch, capsys):
    for name in (*names.split(', '), 'RANK', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        tool('train').set_ranks(launcher)
    text = capsys.readouterr().err
    assert f'--launcher {launcher}: {names} not set' in text and f'Start it by: {command}' in text


def test_what_srun_is_asked_for(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)

    def asked(*arguments, **environment):
        environment.update(PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHON='python3')
        return subprocess.run(['bash', str(TOOLS / 'slurm_train.sh'), *arguments], capture_output=True, text=True,
                              env=dict(os.environ, **environment))

    text = asked('gpu', 'config.py', '16', '--amp').stdout
    for part in ('--partition=gpu', '--nodes=2 ', '--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8',
                 'train.py config.py --launcher slurm --amp'):
        assert part in text, text
    assert '--nodes=1 --ntasks=4 --ntasks-per-node=4' in asked('gpu', 'config.py', '4').stdout
    assert '--nodes=4 ' in asked('gpu', 'config.py', '16', GPUS_PER_NODE='4').stdout
    assert asked('gpu', 'config.py').returncode == asked('gpu', 'config.py', '12').returncode == 2
