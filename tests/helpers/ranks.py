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


def without_batch_statistics(cfg, batch, launcher):
    """A segmentor's config for one rank: group norm and no dropout, so that ranks must equal one process."""
    norm = dict(type='GN', num_groups=4)
    cfg.merge_from_dict(dict(model=dict(
        backbone=dict(norm_cfg=norm), decode_head=dict(norm_cfg=norm, dropout_ratio=0.0),
        auxiliary_head=dict(norm_cfg=norm, dropout_ratio=0.0))))
    cfg.train_dataloader.batch_size = batch
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.launcher = launcher
    if launcher == 'pytorch':
        # mmengine's own start asks for a GPU; a group that is there already is left alone.
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    return cfg
