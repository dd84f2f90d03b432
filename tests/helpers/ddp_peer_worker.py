"""One rank of the two-process test of a loss that is not finite on rank 1 alone, in the second step: a peer's, or the
student's."""

import datetime
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

import conftest  # noqa: E402, F401
from mmengine.hooks import Hook  # noqa: E402
from stock import distill_hook, hook, make_runner, segmentor, teacher_of  # noqa: E402


class Break(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1 and runner.rank == 1:
            with torch.no_grad():
                distill_hook(runner).distiller.teacher.model.decode_head.conv_seg.bias.fill_(float('nan'))


def main(root, out, kind):
    cfg = segmentor(root, f'{out}_work', steps=3)
    cfg.train_dataloader.batch_size, cfg.launcher = 2, 'pytorch'
    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=60))
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    losses = dict(loss_kd=dict(type='SoftmaxKDLoss', at='decode_head.conv_seg', loss_weight=float(kind != 'peer')),
                  loss_hint=dict(type='FitNetLoss', at='backbone'))
    teacher = dict(type='PeerTeacher', config=teacher_of(cfg)) if kind == 'peer' else teacher_of(cfg)
    runner = make_runner(cfg, [hook(teacher, losses)])
    runner.register_hook(Break())
    message = ''
    try:
        runner.train()
    except FloatingPointError as error:
        message = str(error)
    torch.save(dict(message=message, iter=runner.iter), f'{out}_rank{runner.rank}.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
