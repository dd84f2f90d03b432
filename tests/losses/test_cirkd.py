import math

import pytest
import torch
from peak import Largest  # noqa: E402
from torch import nn

from kd_mm.losses.cirkd import Queue, class_cells, class_means
from kd_mm.ops.blocks import relation_divergence
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SMALL = dict(num_classes=3, pixel_memory=60, region_memory=20, pixel_keys=8, region_keys=4)
SWEEP = {'CIRKDMemoryLoss': dict(options=SMALL, skip=dict(
    test_zero_for_equal_inputs='the student is projected first',
    test_outside_of_the_region_nothing_counts='the batch norm of the projection sees the whole map',
    test_prepare_twice_changes_nothing='the memory is state that a step writes'))}
#: softmax of (1, 0) at this temperature is (3/4, 1/4).
TAU = 1 / math.log(3)
KL = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mini(**options):
    return build(dict(type='CIRKDMiniBatchLoss', **options))


def memory(*features, **options):
    loss = build(dict(dict(type='CIRKDMemoryLoss', **SMALL), **options))
    torch.manual_seed(0)
    loss.prepare((features[0], ), (features[-1], ))
    return loss


def labelled_batch(step=0, count=2, **fields):
    labels = torch.randint(0, 3, (count, 8, 10), generator=torch.Generator().manual_seed(step))
    return KDBatch(seg_map=labels, step=step, **fields)


# ------------------------------------------------------------------------------------------------ mini-batch


def test_two_cells():
    student = torch.tensor([[2.0, 0.0], [0.0, 5.0]]).double().view(1, 2, 1, 2)  # orthogonal
    teacher = torch.tensor([[1.0, 3.0]]).double().view(1, 1, 1, 2)  # parallel
    assert mini(tau=TAU)(student, teacher).item() == pytest.approx(KL, rel=1e-12)
    # Two equal images: four pairs, each of the same value.
    assert mini(tau=TAU)(student.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)).item() == pytest.approx(KL, rel=1e-12)


def test_relations_know_neither_length_nor_rotation():
    student, teacher = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 6, 3, 5).double()
    turn = torch.linalg.qr(torch.randn(4, 4).double())[0]
    other = torch.einsum('dc,nchw->ndhw', turn, student) * torch.rand(2, 1, 3, 5).double().add(0.1)
    assert torch.isclose(mini()(other, teacher), mini()(student, teacher), rtol=1e-10)


def test_images_are_related_to_each_other():
    student, teacher = torch.randn(2, 4, 3, 5).double(), torch.randn(2, 6, 3, 5).double()
    alone = sum(mini()(student[i:i + 1], teacher[i:i + 1]) for i in range(2)) / 2
    assert not torch.isclose(mini()(student, teacher), alone, rtol=1e-3)


def direct(student, teacher, tau):
    total = 0
    for i in range(len(student)):
        for j in range(len(student)):
            logs = [(torch.einsum('ca,cb->ab', f[i], f[j]) / tau).log_softmax(1) for f in (
                nn.functional.normalize(student.flatten(2), dim=1), nn.functional.normalize(teacher.flatten(2), dim=1))]
            total = total + (logs[1].exp() * (logs[1] - logs[0])).sum() / student[0, 0].numel()
    return total / len(student)**2


@pytest.mark.parametrize('max_block', [1, 333, 2**23])
def test_blocks_change_nothing(max_block):
    student = torch.randn(2, 4, 6, 7).double().requires_grad_()
    teacher = torch.randn(2, 5, 6, 7).double()
    wanted = direct(student, teacher, 0.1)
    found = mini(max_block=max_block)(student, teacher)
    assert torch.isclose(found, wanted, rtol=1e-12)
    grads = [torch.autograd.grad(value, student)[0] for value in (found, wanted)]
    assert torch.allclose(*grads, rtol=1e-9, atol=1e-15)
    single = mini(max_block=max_block)(student.detach().float(), teacher.float())
    assert single.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_all_relations_never_exist_at_once():
    count, cells, channels, block = 2, 16 * 16, 4, 1024
    student = torch.randn(count, channels, 16, 16, requires_grad=True)
    teacher = torch.randn(count, channels, 16, 16)
    with Largest() as peak:
        mini(max_block=block)(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    features = count * channels * cells
    assert peak.numel == features and block < features < cells**2
    with Largest() as whole:  # the measure does see a matrix that is held at once
        mini()(student, teacher).backward()
    assert whole.numel == count * cells**2


def test_region_is_the_loss_of_its_cells():
    student, teacher = torch.randn(2, 4, 4, 5).double(), torch.randn(2, 6, 4, 5).double()
    mask = torch.zeros(2, 1, 4, 5).double()
    mask[:, :, 1:3, :4] = 1
    whole = mini().level_loss(0, student, teacher, KDBatch(), mask)
    assert torch.isclose(whole, mini()(student[:, :, 1:3, :4], teacher[:, :, 1:3, :4]), rtol=1e-12)
    mask[0] = 0  # pairs with an empty image do not count
    alone = mini().level_loss(0, student, teacher, KDBatch(), mask)
    assert torch.isclose(alone, mini()(student[1:, :, 1:3, :4], teacher[1:, :, 1:3, :4]), rtol=1e-12)


def test_large_maps_are_pooled():
    student, teacher = torch.randn(1, 2, 9, 12).double(), torch.randn(1, 3, 9, 12).double()
    small = [nn.functional.avg_pool2d(x, 4, ceil_mode=True) for x in (student, teacher)]
    assert torch.isclose(mini(pool_above=9)(student, teacher), mini()(*small), rtol=1e-12)
    assert not torch.isclose(mini(pool_above=10)(student, teacher), mini()(*small), rtol=1e-3)


def test_a_dead_cell_has_a_finite_gradient():
    student = torch.randn(1, 3, 2, 2)
    student[:, :, 0, 0] = 0
    student.requires_grad_()
    mini()(student, torch.randn(1, 3, 2, 2)).backward()
    assert student.grad.abs().max() < 100


def test_key_weights_are_part_of_the_softmax():
    row, keys = torch.ones(1, 1).double(), torch.tensor([[[0.0], [0.0]]]).double()
    other = torch.tensor([[[math.log(3)], [0.0]]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 3.0]]).double()
    # Student 1/4 and 3/4; teacher (3 : 3) 1/2 and 1/2.
    found = relation_divergence(row, keys, row, other, torch.ones(1, 1).double(), 1.0, weights)
    assert found.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize('kd_tau', [1.0, 2.0])
def test_one_cell_and_two_keys(kd_tau):
    student, teacher = torch.tensor([[4.0], [0.0]]).double(), torch.tensor([[1.0], [1.0]]).double()
    student, teacher = student.view(1, 2, 1, 1), teacher.view(1, 2, 1, 1)
    loss = memory(student, teacher, num_classes=2, tau=TAU, kd_tau=kd_tau, pixel_weight=3.0, region_weight=5.0).eval()
    loss.projections[0] = nn.Identity()
    for queue in loss.queues[0].values():
        queue.vectors[0], queue.vectors[1] = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    loss.fixed_slots = [dict(pixel=torch.tensor([0]), region=torch.tensor([1]))]
    share = 3**(1 / kd_tau) / (3**(1 / kd_tau) + 1)
    kl = kd_tau**2 * (0.5 * math.log(0.5 / share) + 0.5 * math.log(0.5 / (1 - share)))
    batch = KDBatch(seg_map=torch.zeros(1, 1, 1, dtype=torch.uint8))
    assert loss(student, teacher, batch).item() == pytest.approx(8 * kl, rel=1e-12)
    ignored = KDBatch(seg_map=torch.full((1, 1, 1), 255, dtype=torch.uint8))
    assert loss(student, teacher, ignored).item() == 0.0


def test_ignored_cells_are_no_anchors():
    student, teacher = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    loss = memory(student, teacher).eval()
    loss.projections[0] = nn.Identity()
    batch = KDBatch(seg_map=torch.zeros(1, 4, 4, dtype=torch.long))
    batch.targets.seg_map[:, 2:] = 255
    top = KDBatch(seg_map=batch.targets.seg_map[:, :2])
    whole = loss(student, teacher, batch)
    assert torch.isclose(whole, loss(student[:, :, :2], teacher[:, :, :2], top), rtol=1e-5)
    assert torch.isclose(whole, loss(student + torch.tensor([0.0, 0, 9, 9])[:, None], teacher, batch), rtol=1e-5)


def test_cells_of_a_class():
    labels = torch.randint(0, 4, (3, 50))  # 3 is no class
    cells, counts, place = class_cells(labels, torch.rand(3, 50), 3, 6)
    for image in range(3):
        for label in range(3):
            inside = (labels[image] == label).nonzero()[:, 0]
            taken = cells[image, label, :counts[image, label]]
            assert counts[image, label] == min(len(inside), 6) and len(taken.unique()) == len(taken)
            assert torch.isin(taken, inside).all()
            assert place[image, inside].tolist() == list(range(len(inside)))
    drawn = torch.cat([class_cells(torch.zeros(1, 10, dtype=torch.long), torch.rand(1, 10), 1, 3)[0].flatten()
                       for _ in range(400)])
    assert drawn.bincount(minlength=10).float().std() < 25  # every cell is drawn about 120 times


def test_the_memory_holds_cells_of_the_class_unless_published():
    # The teacher's vectors are the labels themselves.
    batch = labelled_batch()
    teacher = nn.functional.one_hot(batch.targets.seg_map, 3).movedim(-1, 1).float()
    for enqueue, pure in (('class', True), ('published', False)):
        loss = memory(teacher, enqueue=enqueue)
        loss(teacher, teacher, batch)
        queue = loss.queues[0]['pixel']
        assert queue.pointer.tolist() == [32, 32, 32]
        stored = queue.vectors[:, :32].argmax(dim=2)
        assert (stored == torch.arange(3)[:, None]).all() == pure
        regions = loss.queues[0]['region']
        assert regions.pointer.tolist() == [2, 2, 2]
        assert torch.allclose(regions.vectors[:, :2], torch.eye(3)[:, None].expand(3, 2, 3))


def test_means_of_classes():
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    means, present = class_means(rows, torch.tensor([[1, 1, 2]]), 2)
    assert torch.allclose(means[0, 1], torch.tensor([0.5, 0.5]).sqrt()) and means[0, 0].abs().sum() == 0
    assert present.tolist() == [[0, 1]]


def test_a_write_at_the_end_takes_the_last_slots():
    queue = Queue(2, 5, 1)
    queue.vectors.zero_()

    def write(first, *counts):
        queue.write(torch.arange(first, first + 3.0).view(1, 3, 1).expand(2, 3, 1), torch.tensor(counts))
        return queue.vectors[0, :, 0].tolist(), queue.pointer.tolist()

    assert write(1, 3, 0) == ([1, 2, 3, 0, 0], [3, 0])
    assert write(4, 1, 2) == ([1, 2, 3, 4, 0], [4, 2])
    assert write(7, 3, 3) == ([1, 2, 7, 8, 9], [0, 0])
    assert queue.vectors[1, :, 0].tolist() == [4, 5, 7, 8, 9]


def test_the_memory_is_written_once_a_step_and_in_training_only():
    student, teacher = torch.randn(2, 4, 8, 10), torch.randn(2, 6, 8, 10)
    loss = memory(student, teacher)

    def pointers(step):
        loss(student, teacher, labelled_batch(step))
        return loss.queues[0]['region'].pointer.tolist()

    loss.eval()
    assert pointers(0) == [0, 0, 0]
    loss.train()
    assert pointers(0) == [2, 2, 2] and pointers(0) == [2, 2, 2] and pointers(1) == [4, 4, 4]


def test_a_resumed_run_goes_on_as_if_never_stopped():
    student, teacher = torch.randn(2, 4, 8, 10), torch.randn(2, 6, 8, 10)
    loss = memory(student, teacher)
    loss(student, teacher, labelled_batch(0, seed=3))
    saved = {key: value.clone() for key, value in loss.state_dict().items()}
    assert any('vectors' in key for key in saved) and 'last_step' in saved
    expected = loss(student, teacher, labelled_batch(1, seed=3))
    torch.manual_seed(99)
    other = build(dict(type='CIRKDMemoryLoss', **SMALL))
    other.prepare((student, ), (teacher, ))
    other.load_state_dict(saved)
    before = torch.get_rng_state()
    assert torch.equal(other(student, teacher, labelled_batch(1, seed=3)), expected)
    assert torch.equal(torch.get_rng_state(), before)
    other.load_state_dict(saved)
    assert not torch.equal(other(student, teacher, labelled_batch(1, seed=4)), expected)


def test_the_memory_too_is_compared_in_blocks():
    student, teacher = torch.randn(2, 4, 8, 10, requires_grad=True), torch.randn(2, 6, 8, 10)
    values = []
    for block in (200, 2**23):
        loss = memory(student, teacher, max_block=block, pixel_keys=30)
        with Largest() as peak:
            values.append(loss(student, teacher, labelled_batch()))
            values[-1].backward()
        assert (peak.numel >= 160 * 90) == (block > 200)
    assert torch.isclose(*values, rtol=1e-5)


def test_labels_beyond_the_classes_are_an_error():
    student = torch.randn(2, 4, 8, 10)
    with pytest.raises(ValueError, match='label 2 with num_classes=2'):
        memory(student, student, num_classes=2)(student, student, labelled_batch())
    with pytest.raises(ValueError, match='needs a segmentation map'):
        memory(student, student)(student, student, KDBatch())


@pytest.mark.parametrize('name, options, message', [
    ('MiniBatch', dict(tau=0), 'tau'), ('MiniBatch', dict(max_block=0), 'max_block'),
    ('MiniBatch', dict(pool_above=-1), 'pool_above'), ('Memory', dict(SMALL, enqueue='all'), 'enqueue'),
    ('Memory', {}, 'num_classes'), ('Memory', dict(SMALL, kd_tau=0), 'kd_tau'),
    ('Memory', dict(SMALL, pixel_weight=-1), 'pixel_weight'), ('Memory', dict(SMALL, pixel_memory=10), '16'),
    ('Memory', dict(SMALL, region_memory=3), 'region_keys=4')])
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(dict(type=f'CIRKD{name}Loss', **options))
