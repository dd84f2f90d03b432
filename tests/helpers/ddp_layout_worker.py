"""One rank of the two-process test of a teacher's form: batches that are large on one rank alone."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]

from chains import Chain, settle  # noqa: E402
from torch import nn  # noqa: E402

from kd_mm.hosts.taps import Tap  # noqa: E402
from kd_mm.teachers import fast  # noqa: E402
from kd_mm.teachers.base import Teacher  # noqa: E402
from kd_mm.teachers.speed import Speed  # noqa: E402
from kd_mm.teachers.tune import ROUNDS, Tuning  # noqa: E402
from kd_mm.types.batch import KDBatch  # noqa: E402

SMALL, LARGE = (16, 20), (32, 40)


class Fragile(Chain):
    """Fails with the channels innermost, as a `view` of a host does."""

    def forward(self, images):
        maps = super().forward(images)
        return maps.view(maps.shape[0], -1)


def main(out, kind):
    dist.init_process_group('gloo')
    tuning = Tuning([Speed(), Speed(fold=True)])  # the second is a little faster on one rank, and slow on the other
    for _ in range(ROUNDS):
        tuning.note(0, 1.0, 1)
        tuning.note(1, 5.0 if dist.get_rank() else 0.9, 1)
    chosen = tuning.result(torch.device('cpu'))[0]
    fast.LARGE = 2 * LARGE[0] * LARGE[1]
    model = settle(Fragile() if kind == 'fragile' or kind == 'one' and dist.get_rank() else Chain())
    teacher, tap, said = Teacher(model, nn.Conv2d(3, 3, 1)), Tap(model, '', 'teacher'), []
    teacher.go('auto')
    teacher.fast._say = lambda text, level=20: said.append(text)
    images = torch.randn(2, 3, *SMALL)
    teacher.run(images, (), [tap], KDBatch(input_shape=SMALL), full=True)
    tap.clear()
    far, layouts = [], []
    for step in range(4):
        shape = LARGE if step > 0 and (step + dist.get_rank()) % 2 else SMALL
        images = torch.randn(2, 3, *shape)
        teacher.run(images, (), [tap], KDBatch(input_shape=shape))
        with torch.no_grad():
            expected = model(images)
        far.append(float((tap.read()[0] - expected).abs().max() / expected.abs().max()))
        layouts.append(teacher.fast._for(teacher.fast.speed, images).channels_last)
        # what DDP exchanges after a teacher's pass: messages of ranks that are out of step are mixed up
        gradients = torch.full((3, ), float(step))
        dist.all_reduce(gradients)
        assert gradients.tolist() == [2.0 * step] * 3, (step, gradients)
    torch.save(dict(chosen=chosen.words, far=far, layouts=layouts, said=said, checked=sorted(teacher.fast.checked)),
               f'{out}_rank{dist.get_rank()}.pth')
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
