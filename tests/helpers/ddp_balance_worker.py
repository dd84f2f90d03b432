"""One rank of the two-process test of measured weights: a segmentor whose ranks see pictures of different kinds."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from stock import Recorder, distill_hook, hook, make_runner, segmentor, teacher_of  # noqa: E402


def main(root, out, counts, launcher):
    cfg = segmentor(root, f'{out}_work', steps=6)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.optim_wrapper = dict(type='OptimWrapper', accumulative_counts=int(counts), optimizer=dict(type='SGD', lr=0.1))
    cfg.launcher = launcher
    if launcher == 'pytorch':
        # mmengine's own start asks for a GPU; a group that is there already is left alone.
        torch.distributed.init_process_group('gloo')
        cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    auto = dict(type='AutoWeight', every=2, warmup=0)
    losses = dict(
        loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', loss_weight=auto),
        loss_hint=dict(type='FitNetLoss', at='backbone', loss_weight=dict(auto, share=0.5),
                       adapter=dict(type='ConvAdapter', always=True)),
        loss_value=dict(type='CWDLoss', at='backbone', loss_weight=dict(auto, by='loss')))
    runner = make_runner(cfg, [hook(teacher_of(cfg), losses)])
    recorder = Recorder(lambda runner: distill_hook(runner).distiller.balance.state())
    runner.register_hook(recorder)
    runner.train()
    model = runner.model.module if runner.distributed else runner.model
    torch.save(dict(student=model.state_dict(), extras=distill_hook(runner).distiller.terms.state_dict(),
                    losses=recorder.losses, states=recorder.seen), f'{out}_rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
