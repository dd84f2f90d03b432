import pytest
import torch

from kd_mm.losses.fgd import attention
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch

SWEEP = {'FGDLoss': dict(skip=dict(
    test_outside_of_the_region_nothing_counts='attention and context are of the whole map'))}

#: box over cells 1..2 of a 4 x 4 map on 32 x 32 pixels, four cells
BATCH = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[8.0, 8.0, 16.0, 16.0]])])


def terms(student, teacher, batch=BATCH, **options):
    loss = build(dict(type='FGDLoss', **options))
    loss.prepare((student, ), (teacher, ))
    return {name: term.item() for name, term in loss.terms(0, student, teacher, batch).items()}


def test_closed_form():
    # |F| is constant on both sides, so all attentions are 1 and differ in nothing; squares are 1 for 3 channels.
    student, teacher = torch.full((1, 3, 4, 4), -2.0).double(), torch.full((1, 3, 4, 4), -1.0).double()
    found = terms(student, teacher)
    assert found['fg'] == pytest.approx(3.0)  # 4 cells of weight 1/4
    assert found['bg'] == pytest.approx(3.0)  # 12 cells of weight 1/12
    assert found['mask'] == pytest.approx(0.0, abs=1e-12)
    assert found['rela'] == pytest.approx(48.0)  # the context blocks start at 0
    total = build(dict(type='FGDLoss'))(student, teacher, BATCH)
    assert total.item() == pytest.approx(1e-3 * 3 + 5e-4 * 3 + 5e-6 * 48)


def test_attention_by_hand():
    # Channel sizes ln 2 apart at tau 1: softmax 2/3 and 1/3, times C = 2.
    features = torch.zeros(1, 2, 1, 2).double()
    features[0, 0] = torch.tensor([0.6931471805599453, -0.6931471805599453])
    spatial, channel = attention(features, 1.0)
    assert spatial.flatten().tolist() == pytest.approx([1.0, 1.0])
    assert channel.flatten().tolist() == pytest.approx([4 / 3, 2 / 3])
    other = torch.zeros(1, 2, 1, 2).double()
    found = terms(features, other, KDBatch(input_shape=(8, 16), boxes=[torch.zeros(0, 4)]), tau=1.0)
    assert found['mask'] == pytest.approx(2 / 3)
    loss = build(dict(type='FGDLoss', tau=1.0))
    loss.prepare((features, ), (other, ))
    half = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    batch = KDBatch(input_shape=(8, 16), boxes=[torch.zeros(0, 4)])
    assert loss.terms(0, features, other, batch, half)['mask'].item() == pytest.approx(1 / 3)


def test_without_boxes_the_background_is_uniform():
    student, teacher = torch.full((1, 3, 4, 4), 2.0), torch.ones(1, 3, 4, 4)
    found = terms(student, teacher, KDBatch(input_shape=(32, 32), boxes=[torch.zeros(0, 4)]))
    assert found['fg'] == 0.0 and found['bg'] == pytest.approx(3.0)


def test_a_box_over_everything_leaves_no_background():
    batch = KDBatch(input_shape=(32, 32), boxes=[torch.tensor([[0.0, 0.0, 32.0, 32.0]])])
    found = terms(torch.full((1, 3, 4, 4), 2.0), torch.ones(1, 3, 4, 4), batch)
    assert found['bg'] == 0.0
    assert found['fg'] == pytest.approx(3 * 16 / 25)  # the area has the row and column beyond the map


def test_frames():
    batch = KDBatch(input_shape=(32, 32), img_shapes=[(16, 32)], boxes=[torch.tensor([[8.0, 8.0, 16.0, 15.0]])])
    student, teacher = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    student[0, 0, 2:] = 1.0
    inside = terms(student, teacher, batch)['fg']
    stretched = terms(student, teacher, batch, frame='image')['fg']
    # Cells 1..2 by 1..2 of the padded input, but rows 2..4 (with 3 x 2 cells) of the image frame.
    assert inside == pytest.approx(2 / 4) and stretched == pytest.approx(4 / 6)


def test_the_total_weighs_the_terms_and_images_count_once():
    student, teacher = torch.randn(2, 4, 4, 4).double(), torch.randn(2, 4, 4, 4).double()
    batch = KDBatch(input_shape=(32, 32), boxes=BATCH.targets.boxes * 2)
    torch.manual_seed(0)
    loss = build(dict(type='FGDLoss', alpha=1.0, beta=2.0, gamma=3.0, lambda_=4.0))
    total = loss(student, teacher, batch)
    found = loss.terms(0, student, teacher, batch)
    expected = found['fg'] + 2 * found['bg'] + 3 * found['mask'] + 4 * found['rela']
    assert torch.isclose(total, expected, rtol=1e-12)
    twice = KDBatch(input_shape=(32, 32), boxes=BATCH.targets.boxes * 4)
    assert torch.isclose(loss(torch.cat([student] * 2), torch.cat([teacher] * 2), twice), total, rtol=1e-12)


def test_the_teachers_block_is_trained_and_its_features_are_not():
    student, teacher = torch.randn(1, 4, 4, 4).requires_grad_(), torch.randn(1, 4, 4, 4).requires_grad_()
    loss = build(dict(type='FGDLoss'))
    loss(student, teacher, BATCH).backward()
    assert loss.context_t[0].channel_add[3].weight.grad.abs().sum() > 0
    assert teacher.grad is None


def test_no_box_data_is_an_error():
    with pytest.raises(ValueError, match='needs ground-truth boxes'):
        build(dict(type='FGDLoss'))(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 4), KDBatch(input_shape=(32, 32)))
    with pytest.raises(ValueError, match='boxes of 1 images for features of 2'):
        build(dict(type='FGDLoss'))(torch.ones(2, 4, 4, 4), torch.ones(2, 4, 4, 4), BATCH)


@pytest.mark.parametrize('options', [dict(tau=0), dict(alpha=-1), dict(lambda_=float('nan')), dict(frame='feature')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='FGDLoss', **options))
