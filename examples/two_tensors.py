#!/usr/bin/env python3
"""Losses of kd_mm on two tensors: no model, no config, no Runner.

    python examples/two_tensors.py
"""

import torch

from kd_mm import build
from kd_mm.types.batch import KDBatch


def main() -> None:
    torch.manual_seed(0)
    # Class logits of a segmenter, (N, C, H, W). The teacher gets no gradient.
    student, teacher = torch.randn(2, 19, 16, 32, requires_grad=True), torch.randn(2, 19, 16, 32)
    loss = build(dict(type='CWDLoss', tau=4.0, loss_weight=3.0))
    value = loss(student, teacher)
    value.backward()
    print(f'CWDLoss on logits: {value:.4f}, norm of the gradient {student.grad.norm():.4f}')

    # Levels of a pyramid are lists. What a loss needs besides is in a KDBatch: here boxes, (M, 4) for each image, as
    # (x1, y1, x2, y2) in pixels of the padded input.
    student = [torch.randn(2, 256, side, side, requires_grad=True) for side in (16, 8, 4)]
    teacher = [torch.randn(2, 256, side, side) for side in (16, 8, 4)]
    batch = KDBatch(boxes=[torch.tensor([[10.0, 20.0, 60.0, 90.0]]), torch.zeros(0, 4)], input_shape=(128, 128))
    print(f'FGDLoss on three levels with boxes: {build(dict(type="FGDLoss"))(student, teacher, batch):.4f}')

    # A region says where to imitate; a loss without boxes can have one too.
    region = build(dict(type='GTBoxRegion'))
    print(f'PKDLoss inside the boxes: {build(dict(type="PKDLoss"))(student, teacher, batch, region):.4f}')


if __name__ == '__main__':
    main()
