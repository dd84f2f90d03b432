"""One rank of the two-process test of adversarial losses: trains a segmentor and its discriminator two steps."""

import sys
from pathlib import Path

import torch
from mmengine.hooks import Hook

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'engine'))

import conftest  # noqa: E402, F401
from stock import distill_hook, make_runner  # noqa: E402
from test_opponents import holistic, opponent, pspnet, side  # noqa: E402


class Look(Hook):
    """Keeps the discriminator as it is before the first step."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if batch_idx == 0:
            self.before = side(runner)


def main(root, out):
    cfg = pspnet(root, f'{out}_work', steps=2)
    cfg.train_dataloader.batch_size = 2
    cfg.launcher = 'pytorch'
    # mmengine's own start asks for a GPU; a group that is there already is left alone.
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, find_unused_parameters=False)
    runner = make_runner(cfg, holistic(cfg))
    # Every rank starts its discriminator elsewhere: the hook must bring them together.
    distill_hook(runner).config['seed'] = runner.rank
    look = Look()
    runner.register_hook(look)
    runner.train()
    told = runner.message_hub.get_scalar('train/kd_opponent_holistic').data[0].tolist()
    assert opponent(runner).optimizer.state_dict()['state']
    torch.save(dict(student=runner.model.module.state_dict(), side=side(runner), before=look.before, told=told),
               f'{out}_rank{runner.rank}.pth')


if __name__ == '__main__':
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
