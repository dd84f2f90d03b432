"""One rank of the two-process test: trains a segmentor one update and saves what it has learned.

Two ranks with half a batch each must equal one process with the joined batch.
"""

import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from ranks import without_batch_statistics  # noqa: E402
from stock import distill_hook, hook, make_runner, segmentor, teacher_of  # noqa: E402

from kd_mm.hosts.models import build_model  # noqa: E402
from kd_mm.ops.modes import preserved_random_state  # noqa: E402


def main(root, out, batch, counts, launcher):
    cfg = without_batch_statistics(segmentor(root, f'{out}_work', steps=int(counts)), int(batch), launcher)
    cfg.optim_wrapper = dict(type='OptimWrapper', accumulative_counts=int(counts),
                             optimizer=dict(type='SGD', lr=0.5), clip_grad=dict(max_norm=5.0))
    losses = dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'),
        loss_hint=dict(type='FitNetLoss', at='backbone', adapter=dict(type='ConvAdapter', always=True)),
        loss_off=dict(type='FitNetLoss', at='backbone', adapter=dict(type='ConvAdapter', always=True), loss_weight=0))
    teacher, weights = teacher_of(cfg, backbone=dict(depth=34)), f'{out}_teacher_{os.getpid()}.pth'
    with preserved_random_state(0):
        model = build_model(Config(teacher), 'mmseg')
        model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), weights)
    # Pictures too: every rank looks, one draws, and the updates are those without.
    runner = make_runner(cfg, [hook(teacher, losses, teacher_ckpt=weights),
                               dict(type='kd_mm.DistillVisHook', images=1)])
    assert runner.distributed == (launcher == 'pytorch')
    # Every rank starts its adapters elsewhere: the hook must bring them together.
    distill_hook(runner).config['seed'] = runner.rank
    runner.train()
    model = runner.model.module if runner.distributed else runner.model
    logged = runner.message_hub.log_scalars
    alike = {name: buffer.data[0].tolist() for name, buffer in logged.items() if 'agree' in name}
    torch.save(dict(alike=alike, pictures=len(list(Path(runner.work_dir).glob('distill_vis/*.png'))),
                    student=model.state_dict(), extras=distill_hook(runner).distiller.terms.state_dict()),
               f'{out}_rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
