"""Real processes over gloo."""

import socket
import subprocess
import sys

import torch


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def run(arguments, out, ranks):
    command = [sys.executable, *arguments]
    if ranks > 1:
        command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={ranks}',
                   '--master_addr=127.0.0.1', f'--master_port={free_port()}', *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(f'{out}_rank{rank}.pth', weights_only=True) for rank in range(ranks)]
