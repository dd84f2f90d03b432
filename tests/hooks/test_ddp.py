"""Two real processes over gloo against one process on the joined batch."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name('ddp_worker.py')


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def launch(root, out, batch, counts, ranks):
    arguments = [str(WORKER), str(root), str(out), str(batch), str(counts), 'pytorch' if ranks > 1 else 'none']
    command = [sys.executable, *arguments]
    if ranks > 1:
        command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
                   '--master_addr=127.0.0.1', f'--master_port={free_port()}', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(f'{out}_rank{rank}.pth', weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope='module')
def joined(cityscapes_root, tmp_path_factory):
    return launch(cityscapes_root, tmp_path_factory.mktemp('one') / 'joined', 4, 1, 1)[0]


@pytest.mark.parametrize('batch, counts', [(2, 1), (1, 2)], ids=['one step', 'accumulated with no_sync'])
def test_two_processes_equal_one_on_the_joined_batch(cityscapes_root, tmp_path, joined, batch, counts):
    first, second = launch(cityscapes_root, tmp_path / 'two', batch, counts, 2)
    for part in ('student', 'extras'):
        assert first[part].keys() == joined[part].keys()
        for key, value in joined[part].items():
            torch.testing.assert_close(first[part][key], second[part][key], rtol=0, atol=0, msg=f'ranks: {key}')
            torch.testing.assert_close(first[part][key], value, rtol=1e-4, atol=1e-6, msg=f'joined: {key}')
