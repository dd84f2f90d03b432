"""One rank of the two-process test on shared proposals: Mask R-CNN, the images of rank 1 without objects."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from stock import Recorder, distill_hook, hook, make_runner, teacher_of  # noqa: E402
from two_stage import two_stage  # noqa: E402


def main(root, out):
    cfg = two_stage(root, f'{out}_work', 'mask', steps=2)
    # Image i goes to rank i modulo 2.
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.launcher = 'pytorch'
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    losses = dict(
        loss_dkd=dict(type='DKDLoss', at='@roi_logits'),
        loss_bound=dict(type='ChenBoxLoss', at='@roi_boxes', margin=100.0),
        loss_masks=dict(type='SigmoidKDLoss', at='@roi_masks'),
        loss_hint=dict(type='FitNetLoss', at='@roi_features', adapter=dict(type='ConvAdapter', always=True)))
    recorder = Recorder()
    runner = make_runner(cfg, [hook(teacher_of(cfg), losses)])
    runner.register_hook(recorder)
    runner.train()
    torch.save(dict(student=runner.model.module.state_dict(), losses=recorder.losses,
                    extras=distill_hook(runner).distiller.terms.state_dict()), f'{out}_rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
