"""tools/train.py, tools/test.py and the hosts' own tools/train.py, on stock data sets written by the test.

What a user types runs as a process of its own; the rest calls ``main`` with the same arguments, which saves the start.
"""

import copy
import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stock import TOOLS, det_config, seg_config, tool, write_stock_cityscapes, write_stock_coco

from kd_mm.hosts.checkpoint import load_file
from kd_mm.hosts.zoo import package_folder

TRAIN, TEST = tool('train'), tool('test')


@pytest.fixture(autouse=True)
def no_rank_left_behind(monkeypatch):
    """The tools set LOCAL_RANK for their process, which here is that of all tests."""
    monkeypatch.setenv('LOCAL_RANK', '0')


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """For each host: the data, a plain config, and the same with distillation from a teacher config."""
    tmp = tmp_path_factory.mktemp('tools')
    found = {}
    for name, cfg, root, at in (
            ('det', det_config(), write_stock_coco(tmp / 'coco'), 'neck'),
            ('seg', seg_config(tmp), write_stock_cityscapes(tmp / 'cityscapes'), 'decode_head.conv_seg')):
        for loader in ('train', 'val', 'test'):
            cfg[f'{loader}_dataloader'].update(batch_size=2, num_workers=0, persistent_workers=False)
        (tmp / 'configs' / name).mkdir(parents=True)
        # mmengine rounds the time in a run's name to two minutes: with files of one name the second host would get the
        # scope of the first.
        plain, kd = (tmp / 'configs' / name / f'{name}_{kind}.py' for kind in ('plain', 'kd'))
        cfg.dump(str(plain))
        kd.write_text(f"_base_ = '{plain.name}'\n"
                      "custom_hooks = [dict(type='kd_mm.DistillHook', teacher_ckpt='random',\n"
                      f"    teacher={str(plain)!r}, losses=dict(loss_cwd=dict(type='CWDLoss', at={at!r})))]\n")
        found[name] = dict(root=root, plain=str(plain), kd=str(kd), cfg=cfg, tmp=tmp,
                           last='epoch_1.pth' if name == 'det' else 'iter_2.pth')
    return found


def start(*command, **environment):
    """Start a process; the tests wait for it with :func:`finish`."""
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=dict(os.environ, OMP_NUM_THREADS='1', **environment))


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-4000:]
    return output


def scalars(work_dir):
    """Training entries of the log of a run."""
    lines = [json.loads(line) for path in Path(work_dir).glob('*/vis_data/scalars.json')
             for line in path.read_text().splitlines()]
    return [line for line in lines if 'loss' in line]


#: Two images a step make two steps of four images, and the stock configs log every 50: each step here.
LOG = 'default_hooks.logger.interval=1'


def check_distilled(task, work_dir):
    steps = scalars(work_dir)
    assert len(steps) == 2 and all(step['loss_cwd'] > 0 for step in steps), steps
    checkpoint = load_file(str(work_dir / task['last']))
    assert not any('teacher' in key for key in checkpoint['state_dict'])


def test_commands_of_a_user(tasks):
    """Distil in processes of their own: a detector, and a segmentor on two processes (gloo without a GPU)."""
    det, seg = tasks['det'], tasks['seg']
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    alone = start(sys.executable, TOOLS / 'train.py', det['kd'], '--work-dir', det['tmp'] / 'det_ours', '--cfg-options',
                  f'data_root={det["root"]}', LOG)
    several = start('bash', TOOLS / 'dist_train.sh', seg['kd'], 2, '--work-dir', seg['tmp'] / 'seg_ours',
                    '--cfg-options', f'data_root={seg["root"]}', LOG, PYTHON=sys.executable, PORT=str(port))
    finish(alone)
    finish(several)
    check_distilled(det, det['tmp'] / 'det_ours')
    check_distilled(seg, seg['tmp'] / 'seg_ours')


@pytest.mark.parametrize('which', [TRAIN, TEST], ids=['train', 'test'])
def test_the_process_group_ends_with_the_run(tasks, tmp_path, monkeypatch, which):
    """Left alone it may abort a process at its end; the run itself is in the test above."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        monkeypatch.setattr(which, 'build_runner', lambda cfg: SimpleNamespace(
            train=list, test=list, model=torch.nn.Identity()))
        torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
        weights = [str(tmp_path / 'weights.pth')] if which is TEST else []
        which.main([tasks['seg']['plain'], *weights, '--work-dir', str(tmp_path / 'run'), '--cfg-options',
                    f'data_root={tasks["seg"]["root"]}'])
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_the_tool_of_the_host(tasks, name, monkeypatch):
    """The same config through the train.py that the host installs, which knows nothing of kd_mm."""
    task = tasks[name]
    root, work_dir = task['root'], task['tmp'] / f'{name}_theirs'
    # It changes the variable data_root alone, so each path is given.
    options = [f'{loader}_dataloader.dataset.data_root={root}/' for loader in ('train', 'val', 'test')]
    if name == 'det':
        options += [f'{phase}_evaluator.ann_file={root}/annotations/instances_val2017.json'
                    for phase in ('val', 'test')]
    script = str(package_folder('mmdet' if name == 'det' else 'mmseg') / 'tools' / 'train.py')
    monkeypatch.setattr(sys, 'argv', [script, task['kd'], '--work-dir', str(work_dir), '--cfg-options', LOG,
                                      f'visualizer.name={name}_theirs', *options])
    runpy.run_path(script, run_name='__main__')
    check_distilled(task, work_dir)


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_train_resume_and_evaluate(tasks, name, capsys):
    """Plain training, a second run refused and then resumed, and tools/test.py on the distilled checkpoint."""
    task = tasks[name]
    root, work_dir = task['root'], task['tmp'] / f'{name}_plain'
    data = ['--cfg-options', f'data_root={root}', LOG, f'visualizer.name={name}_plain']
    TRAIN.main([task['plain'], '--work-dir', str(work_dir), *data])
    saved = work_dir / task['last']
    before = saved.stat().st_mtime_ns
    with pytest.raises(SystemExit, match='already has checkpoints.*--resume.*--overwrite'):
        TRAIN.main([task['plain'], '--work-dir', str(work_dir), *data])
    longer = ['train_cfg.max_epochs=2'] if name == 'det' else ['train_cfg.max_iters=4']
    TRAIN.main([task['plain'], '--work-dir', str(work_dir), '--resume', *data, *longer])
    assert saved.stat().st_mtime_ns == before
    resumed = load_file(str(work_dir / ('epoch_2.pth' if name == 'det' else 'iter_4.pth')))
    assert resumed['meta']['iter'] == 4
    if name == 'seg':  # what a distillation with adapters leaves for its own resume
        resumed['optimizer']['param_groups'].append(dict(resumed['optimizer']['param_groups'][-1], params=[]))
        torch.save(resumed, task['tmp'] / 'distilled.pth')
        with pytest.raises(SystemExit, match='has a group of parameters more.*load_from in place of resume'):
            TRAIN.main([task['plain'], '--work-dir', str(task['tmp'] / 'again'), '--resume',
                        str(task['tmp'] / 'distilled.pth'), *data, 'visualizer.name=again'])

    checkpoint = task['tmp'] / f'{name}_ours' / task['last']
    checkpoint = checkpoint if checkpoint.exists() else saved  # when run without the test above
    out = task['tmp'] / ('predictions.pkl' if name == 'det' else 'predictions')
    config = task['kd'] if checkpoint != saved else task['plain']
    TEST.main([config, str(checkpoint), '--work-dir', str(task['tmp'] / f'{name}_test'), '--out', str(out), *data])
    written = [json.loads(line) for path in (task['tmp'] / f'{name}_test').glob('*/*.json')
               for line in path.read_text().splitlines()]
    metric = 'coco/bbox_mAP' if name == 'det' else 'mIoU'
    assert any(metric in line and np.isfinite(line[metric]) for line in written), written
    assert out.is_file() if name == 'det' else len(list(out.glob('*.png'))) == 4


def test_problems_of_the_distillation_are_told_without_a_traceback(tasks):
    task = tasks['det']
    done = subprocess.run(
        [sys.executable, str(TOOLS / 'train.py'), task['kd'], '--work-dir', str(task['tmp'] / 'problems'),
         '--cfg-options', f'data_root={task["root"]}', 'custom_hooks.0.teacher=no/such/file.py'],
        capture_output=True, text=True)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'kd_mm: 1 problem(s) in the distillation config' in done.stderr and 'no/such/file.py' in done.stderr


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_missing_data_is_named_with_the_mend(tasks, name, tmp_path):
    task = tasks[name]
    missing = tmp_path / 'nowhere'
    with pytest.raises(SystemExit) as error:
        TRAIN.main([task['kd'], '--work-dir', str(tmp_path / 'run'), '--cfg-options', f'data_root={missing}'])
    text = str(error.value)
    assert f'train_dataloader.dataset.data_root: {missing}' in text
    assert 'data_root=/path/to/data' in text and 'train_dataloader.dataset.data_root=' in text
    assert not (tmp_path / 'run').exists()
    # A root that is there with a part of the data: the parts that are not, each once.
    root = tmp_path / 'half'
    root.mkdir()
    with pytest.raises(SystemExit) as error:
        TRAIN.main([task['kd'], '--work-dir', str(tmp_path / 'run'), '--cfg-options', f'data_root={root}'])
    parts = ('annotations/instances_train2017.json', 'train2017', 'annotations/instances_val2017.json') \
        if name == 'det' else ('leftImg8bit/train', 'gtFine/train', 'leftImg8bit/val')
    for part in parts:
        assert str(root / part) in str(error.value)


def test_the_data_root_moves_with_everything_below(tasks):
    cfg = copy.deepcopy(tasks['det']['cfg'])
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dict(cfg.train_dataloader.dataset), dict(cfg.train_dataloader.dataset, data_root='elsewhere/')])
    cfg.val_evaluator = [cfg.val_evaluator]
    TRAIN.move_data_root(cfg, 'data/coco/', '/new/place')
    first, second = cfg.train_dataloader.dataset.datasets
    assert first.data_root == '/new/place/' and second.data_root == 'elsewhere/'
    assert cfg.val_evaluator[0].ann_file == '/new/place/annotations/instances_val2017.json'
    keys = dict(TRAIN.data_paths(cfg.train_dataloader, 'train_dataloader'))
    assert keys['train_dataloader.dataset.datasets.0.data_prefix.img'] == '/new/place/train2017/'
    assert keys['train_dataloader.dataset.datasets.1.ann_file'] == 'elsewhere/annotations/instances_train2017.json'


def test_wrong_calls_are_told_what_to_do(tasks, tmp_path):
    det = tasks['det']
    data = ['--cfg-options', f'data_root={det["root"]}']
    for argv, text in (
            (['no.py'], 'no such config: no.py'),
            ([det['plain'], '--resume', 'no.pth', *data], '--resume: no such checkpoint: no.pth')):
        with pytest.raises(SystemExit, match=text):
            TRAIN.main(argv)
    with pytest.raises(SystemExit, match='no such checkpoint: no.pth'):
        TEST.main([det['plain'], 'no.pth', *data])
    empty = tmp_path / 'empty.py'
    empty.write_text('model = dict()')
    with pytest.raises(SystemExit, match='default_scope=None.*model.type=.*mmdet, mmseg'):
        TRAIN.main([str(empty)])
    other = copy.deepcopy(tasks['seg']['cfg'])
    other.pop('auto_scale_lr', None)
    with pytest.raises(SystemExit, match='base_batch_size'):
        TRAIN.use_auto_scale_lr(other)
    TRAIN.use_amp(other)
    assert other.optim_wrapper.type == 'AmpOptimWrapper' and other.optim_wrapper.loss_scale == 'dynamic'


def test_what_stops_at_the_start_is_said_with_the_mend(tasks, tmp_path):
    """Weights to start from that are not there; a strategy of several processes in one."""
    task, work = tasks['det'], ['--work-dir', str(tmp_path / 'run')]
    data = ['--cfg-options', f"data_root={task['root']}"]
    with pytest.raises(SystemExit, match="load_from='lost.pth': no such file .looked at /.*or load_from=None to start"):
        TRAIN.main([task['kd'], *work, *data, 'load_from=lost.pth'])
    with pytest.raises(SystemExit, match="strategy='DDPStrategy' is for several processes.*torchrun"):
        TRAIN.main([task['kd'], *work, *data, 'runner_type=FlexibleRunner', 'strategy.type=DDPStrategy'])


def test_two_folders_do_not_share_a_work_dir():
    names = [TRAIN.relative_stem(f'configs/det/{method}/same.py') for method in ('fgd', 'pkd')]
    assert names == ['det/fgd/same', 'det/pkd/same']
    assert TRAIN.relative_stem('/somewhere/mine.py') == 'mine'
