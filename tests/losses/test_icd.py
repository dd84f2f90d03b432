import copy
import math

import pytest
import torch

from kd_mm.losses.icd import image_cells, position_embedding, sines, value_distance
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def make_batch(**changes):
    fields = dict(input_shape=(32, 32), boxes=[torch.tensor([[4.0, 4.0, 20.0, 20.0]]), torch.zeros(0, 4)],
                  labels=[torch.tensor([1]), torch.zeros(0, dtype=torch.long)], step=3)
    fields.update(changes)
    return KDBatch(**fields)


def maps(channels=16):
    return torch.randn(2, channels, 4, 4), torch.randn(2, channels, 2, 2)


def test_value_distance_by_hand():
    # Normalised to (1, -1) and (-1, 1): the squares are 4, or 0 where they agree; the weights are 3 and 1.
    student = torch.tensor([[5.0, 1.0], [1.0, 5.0]]).double().view(1, 1, 2, 2)
    teacher = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).double().view(1, 1, 2, 2)
    weights = torch.tensor([3.0, 1.0]).double().view(1, 1, 2)
    assert value_distance(student, teacher, weights).item() == pytest.approx(3 * 4 / 4, rel=1e-3)
    assert value_distance(student, teacher, 0 * weights).item() == 0


def test_only_real_instances_weigh():
    student, teacher, batch = maps(), maps(), make_batch()
    loss = build(dict(type='ICDLoss', num_classes=3))
    loss.prepare(student, teacher)
    # The second image has invented instances alone: it counts as an image with the loss 0.
    moved = tuple(torch.cat([level[:1], 5 * torch.randn_like(level[1:])]) for level in student)
    assert torch.isclose(loss(moved, teacher, batch), loss(student, teacher, batch), rtol=1e-6)
    moved = tuple(torch.cat([5 * torch.randn_like(level[:1]), level[1:]]) for level in student)
    assert not torch.isclose(loss(moved, teacher, batch), loss(student, teacher, batch), rtol=1e-3)


def test_uniform_attention_by_hand():
    student, teacher, batch = maps(), maps(), make_batch(img_shapes=[(32, 32), (32, 32)])
    loss = build(dict(type='ICDLoss', num_classes=3, heads=4, distill=2.0))
    loss.prepare(student, teacher)
    for part in ('weight', 'bias'):
        torch.nn.init.zeros_(getattr(loss.layers['query'], part))
    values = [torch.cat([loss.split(loss.layers['value'](level.flatten(2).transpose(1, 2))) for level in side], dim=2)
              for side in (student, teacher)]
    gap = (torch.nn.functional.layer_norm(values[0], (4, )) - torch.nn.functional.layer_norm(values[1], (4, ))).square()
    assert torch.isclose(loss(student, teacher, batch), 2 * gap.mean(dim=2)[0].mean() / 2, rtol=1e-5)


def test_the_auxiliary_task_trains_the_decoder_and_nothing_else():
    student, teacher = tuple(m.requires_grad_() for m in maps()), maps()
    loss = build(dict(type='ICDLoss', num_classes=3))
    value = loss(student, teacher, make_batch())
    value.backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert loss.layers['predict'][0].weight.grad.abs().sum() > 0
    silent = build(dict(type='ICDLoss', num_classes=3, auxiliary=0.0))
    silent.prepare(student, teacher)
    silent.load_state_dict({key: copy.deepcopy(item) for key, item in loss.state_dict().items()
                            if key in silent.state_dict()})
    mine = [level.grad.clone() for level in student]
    for level in student:
        level.grad = None
    other = silent(student, teacher, make_batch())
    other.backward()
    assert torch.isclose(value, other)
    # The gradients go up to 0.1: those near zero are rounded at that scale.
    assert all(torch.allclose(a, b.grad, atol=1e-6) for a, b in zip(mine, student))


def test_the_decoder_learns_its_task():
    torch.manual_seed(0)
    teacher, batch = maps(), make_batch()
    loss = build(dict(type='ICDLoss', num_classes=3, distill=0.0))
    loss.prepare(teacher, teacher)
    values = []

    def watch(*arguments, original=loss.auxiliary_loss):
        result = original(*arguments)
        values.append(result.item())
        return result

    loss.auxiliary_loss = watch
    parameters = list(loss.parameters())
    for _ in range(30):
        grads = torch.autograd.grad(loss(teacher, teacher, batch), parameters)
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads):
                parameter -= 0.05 * grad
    assert values[-1] < 0.7 * values[0]


def test_instances():
    batch = make_batch(img_shapes=[(32, 20), (16, 32)], boxes=[torch.tensor([[5.0, 8.0, 15.0, 24.0]] * 2),
                                                               torch.zeros(0, 4)],
                       labels=[torch.tensor([1, 2]), torch.zeros(0, dtype=torch.long)])
    loss = build(dict(type='ICDLoss', num_classes=3))
    found = loss.instances(batch, torch.zeros(2, 4, 1, 1))
    assert found.real.sum(dim=1).tolist() == [2, 0] and found.used.sum(dim=1).tolist() == [12, 1]
    assert found.boxes[0, 0].tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75])
    assert found.sizes[0, 0].tolist() == pytest.approx([10.0, 16.0]) and found.labels[0, :2].tolist() == [1, 2]
    edges = found.boxes[..., 2:] - found.boxes[..., :2]
    centre = (found.boxes[..., 2:] + found.boxes[..., :2]) / 2
    assert ((found.points - centre).abs() <= 0.3 * edges + 1e-6).all()
    assert found.boxes.min() >= 0 and found.boxes.max() <= 1
    again, later = loss.instances(batch, torch.zeros(2, 4, 1, 1)), loss.instances(
        make_batch(step=4), torch.zeros(2, 4, 1, 1))
    assert torch.equal(found.points, again.points) and not torch.equal(found.points[0, 2:6], later.points[0, 2:6])
    few = build(dict(type='ICDLoss', num_classes=3, max_instances=2, negatives=1.0))
    assert few.instances(batch, torch.zeros(2, 4, 1, 1)).used.sum(dim=1).tolist() == [2, 1]


def test_descriptors():
    loss = build(dict(type='ICDLoss', num_classes=3))
    found = loss.instances(make_batch(), torch.zeros(2, 4, 1, 1))
    rows = loss.descriptors(found)
    assert rows.shape[2] == 3 + 256 + 10
    assert rows[0, 0, :3].tolist() == [0, 1, 0]
    # 16 pixels: log(16) * 1.44 - 5 is below 0, the first step in both directions.
    assert rows[0, 0, -10:].tolist() == [1, 0, 0, 0, 0] * 2


def test_sines_and_padding():
    assert sines(torch.tensor([0.25]), 4)[0].tolist() == pytest.approx(
        [1.0, 0.0, math.sin(math.pi / 200), math.cos(math.pi / 200)], abs=1e-6)
    inside = image_cells(torch.tensor([[20.0, 32.0]]), (32, 32), (4, 4))
    assert inside[0, 0].sum(dim=1).tolist() == [4, 4, 4, 0]  # 2.5 rows are three
    embedding = position_embedding(inside, 8)
    assert embedding.shape == (1, 8, 4, 4)
    # The last row of the image, and the padding below, are at 1, where the sine is 0 again.
    assert embedding[0, 0, 2].abs().max() < 1e-4


def test_padding_is_left_out():
    student, teacher = maps(), maps()
    batch = make_batch(img_shapes=[(32, 16), (32, 32)])
    loss = build(dict(type='ICDLoss', num_classes=3))
    before = loss(student, teacher, batch)
    moved = (student[0].clone(), student[1].clone())
    moved[0][0, :, :, 2:] += 1
    moved[1][0, :, :, 1:] += 1
    assert torch.isclose(loss(moved, teacher, batch), before)


def test_errors():
    loss = build(dict(type='ICDLoss', num_classes=1))
    with pytest.raises(ValueError, match='label 1, but num_classes=1'):
        loss(maps(), maps(), make_batch())
    with pytest.raises(ValueError, match='All levels must have the same channels'):
        build(dict(type='ICDLoss'))((torch.zeros(2, 4, 4, 4), torch.zeros(2, 8, 2, 2)),
                                    (torch.zeros(2, 4, 4, 4), torch.zeros(2, 8, 2, 2)), make_batch())
    with pytest.raises(ValueError, match='needs ground-truth boxes'):
        build(dict(type='ICDLoss'))(maps(), maps(), KDBatch(input_shape=(32, 32)))


@pytest.mark.parametrize('options', [
    dict(num_classes=0), dict(heads=0), dict(tau=0), dict(distill=-1), dict(auxiliary=-1), dict(negatives=-1),
    dict(max_instances=0)])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='ICDLoss', **options))
