"""One rank of a two-process training with labels from a teacher: only one rank's images have objects of their own."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from stock import Recorder, detector, make_runner, teacher_of  # noqa: E402


def main(root, out):
    cfg = detector(root, f'{out}_work', steps=2)
    cfg.model.test_cfg.score_thr = 0.0
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=False)
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.launcher = 'pytorch'
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    recorder, boxes = Recorder(), []
    runner = make_runner(cfg, [dict(
        type='kd_mm.DistillHook', teacher=teacher_of(cfg), teacher_ckpt='random',
        losses=dict(loss_kd=dict(type='SigmoidKDLoss', at='@logits')),
        labels=dict(type='PseudoLabels', score=0.005, iou=0.5, classes='positional'))])
    runner.register_hook(recorder)
    original = runner.model.module.loss

    def loss(inputs, samples, *args, **kwargs):
        if torch.is_grad_enabled():  # not while the names of the losses are looked up
            boxes.append([len(sample.gt_instances) for sample in samples])
        return original(inputs, samples, *args, **kwargs)

    runner.model.module.loss = loss
    runner.train()
    torch.save(dict(student=runner.model.module.state_dict(), boxes=boxes, losses=recorder.losses), f'{out}_rank'
               f'{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
