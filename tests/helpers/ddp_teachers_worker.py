"""One rank of the two-process test of teachers that change: a peer or a mean teacher, five steps of a segmentor.

Two ranks with half a batch each must equal one process with the joined batch.
"""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from ranks import without_batch_statistics  # noqa: E402
from stock import Recorder, distill_hook, make_runner, segmentor, teacher_of  # noqa: E402

STEPS = 5


def main(root, out, kind, batch, counts, launcher):
    cfg = without_batch_statistics(segmentor(root, f'{out}_work', steps=STEPS * int(counts)), int(batch), launcher)
    # The decay is large: a parameter that takes no part in a step must not be touched by it on any number of ranks. The
    # rate is small: what is rounding in one step, other on each processor, must not grow in the next ones.
    cfg.optim_wrapper = dict(type='OptimWrapper', accumulative_counts=int(counts), clip_grad=dict(max_norm=5.0),
                             optimizer=dict(type='SGD', lr=0.005, momentum=0.9, weight_decay=1.0))
    adapter = dict(type='ConvAdapter', always=True)
    losses = dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg'),
        loss_hint=dict(type='FitNetLoss', at='backbone', adapter=adapter),
        loss_off=dict(type='FitNetLoss', at='backbone', adapter=adapter, loss_weight=0))
    entry = dict(type='kd_mm.DistillHook', losses=losses, teacher=dict(type='EMATeacher', momentum=0.25))
    if kind == 'peer':
        entry.update(teacher=dict(type='PeerTeacher', config=teacher_of(cfg, backbone=dict(depth=34))),
                     teacher_ckpt='random')
    runner, recorder = make_runner(cfg, [entry]), Recorder()
    runner.register_hook(recorder)
    assert runner.distributed == (launcher == 'pytorch')
    # Every rank starts its peer and its adapters elsewhere: the hook must bring them together.
    distill_hook(runner).config['seed'] = runner.rank
    runner.train()
    teacher = distill_hook(runner).distiller.teacher
    found = dict(student=runner.model.module if runner.distributed else runner.model, teacher=teacher.model,
                 extras=distill_hook(runner).distiller.terms)
    if kind == 'peer':
        found['mirrors'] = teacher.terms
    optimizers = [runner.optim_wrapper.optimizer, *([teacher.wrapper.optimizer] if kind == 'peer' else [])]
    torch.save(dict(
        {part: module.state_dict() for part, module in found.items()}, losses=recorder.losses,
        optimizers={f'{index}.{number}.{name}': value for index, optimizer in enumerate(optimizers)
                    for number, state in optimizer.state_dict()['state'].items() for name, value in state.items()
                    if value is not None}), f'{out}_rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
