"""One rank of the second two-process test: a detector, ranks with last batches of different size, one without boxes."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from stock import Recorder, detector, distill_hook, hook, make_runner, teacher_of  # noqa: E402


def main(root, out):
    cfg = detector(root, f'{out}_work', steps=2)
    cfg.train_dataloader.batch_size = 2
    # Image i goes to rank i modulo 2; without rounding up the last batch of rank 1 is smaller.
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False, round_up=False)
    cfg.launcher = 'pytorch'
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    adapter = dict(type='ConvAdapter', always=True)
    losses = dict(
        loss_fgd=dict(type='FGDLoss', at='neck', adapter=adapter),
        loss_fg=dict(type='FitNetLoss', at='neck', adapter=adapter, region=dict(type='GTBoxRegion')),
        loss_kd=dict(type='SigmoidKDLoss', at='@logits'))
    recorder, boxes = Recorder(), []
    runner = make_runner(cfg, [hook(teacher_of(cfg), losses)])
    runner.register_hook(recorder)
    original = runner.model.module.loss

    def loss(inputs, samples, *args, **kwargs):
        if torch.is_grad_enabled():  # not while the names of the losses are looked up
            boxes.append([len(sample.gt_instances) for sample in samples])
        return original(inputs, samples, *args, **kwargs)

    runner.model.module.loss = loss
    runner.train()
    torch.save(dict(student=runner.model.module.state_dict(), boxes=boxes, losses=recorder.losses,
                    extras=distill_hook(runner).distiller.terms.state_dict()), f'{out}_rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
