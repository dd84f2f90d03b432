import pytest
import torch

from kd_mm.losses.fbkd import NonLocalBlock, batch_norm2, spatial_attention
from kd_mm.registry import build

SWEEP = {'FBKDLoss': dict(skip=dict(
    test_outside_of_the_region_nothing_counts='attention and non-local relations are of the whole map'))}


def terms(student, teacher, mask=None, **options):
    loss = build(dict(type='FBKDLoss', **options))
    loss.prepare((student, ), (teacher, ))
    return {name: term.item() for name, term in loss.terms(0, student, teacher, mask).items()}


def test_closed_form():
    # Constant maps: all attentions are 1; trained layers start as the identity. 2 images, 3 channels, 4 cells.
    student, teacher = torch.full((2, 3, 2, 2), 1.0).double(), torch.full((2, 3, 2, 2), 3.0).double()
    found = terms(student, teacher)
    assert found['feature'] == pytest.approx((24 * 4)**0.5)  # 24 elements, squared gap 4
    assert found['channel'] == pytest.approx((6 * 4)**0.5)
    assert found['nonlocal'] == pytest.approx((24 * 4)**0.5)
    # The 3x3 convolution is the identity, so no border is lost.
    assert found['spatial'] == pytest.approx((8 * 4)**0.5)
    total = build(dict(type='FBKDLoss', feature=1, channel=2, spatial=3, nonlocal_=4))(student, teacher)
    assert total.item() == pytest.approx(5 * 96**0.5 + 2 * 24**0.5 + 3 * 32**0.5)


def test_attention_is_the_mean_of_both_sides_and_has_no_gradient():
    student, teacher = torch.zeros(1, 1, 1, 2).double(), torch.zeros(1, 1, 1, 2).double()
    teacher[..., 0] = 0.6931471805599453  # attention 4/3 and 2/3 at tau 1; the student's is 1 and 1
    assert spatial_attention(teacher, 1.0).flatten().tolist() == pytest.approx([4 / 3, 2 / 3])
    found = terms(student, teacher, tau=1.0)['feature']
    assert found == pytest.approx(0.6931471805599453 * (7 / 6)**0.5)


def test_attention_has_no_gradient():
    student, teacher = torch.randn(1, 4, 4, 4).double().requires_grad_(), torch.randn(1, 4, 4, 4).double()
    loss = build(dict(type='FBKDLoss'))
    loss.prepare((student, ), (teacher, ))
    held = (spatial_attention(student, 0.5) + spatial_attention(teacher, 0.5)).detach() / 2
    expected = batch_norm2((teacher - student) * held.sqrt())
    ours = torch.autograd.grad(loss.terms(0, student, teacher)['feature'], student)[0]
    assert torch.allclose(ours, torch.autograd.grad(expected, student)[0], rtol=1e-12)


def test_the_block_is_the_product_of_all_pairs():
    torch.manual_seed(0)
    block = NonLocalBlock(4, 2, 2).double()
    torch.nn.init.normal_(block.norm.weight)
    features = torch.randn(2, 4, 4, 6).double()
    theta = block.theta(features).flatten(2)
    g, phi = (torch.nn.functional.max_pool2d(part(features), 2).flatten(2) for part in (block.g, block.phi))
    pairs = torch.einsum('nci,ncj->nij', theta, phi) / phi.shape[2]
    mixed = torch.einsum('nij,ncj->nci', pairs, g).view(2, 2, 4, 6)
    assert torch.allclose(block(features), features + block.norm(block.conv(mixed)), rtol=1e-10)


def test_the_term_of_the_blocks_is_their_gap():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 4, 6).double(), torch.randn(2, 8, 4, 6).double()
    loss = build(dict(type='FBKDLoss'))
    loss.prepare((student, ), (teacher, ))
    layers = loss.adapters[0]
    for parameter in loss.parameters():  # biases and norms start at 0
        torch.nn.init.normal_(parameter)
    mask = torch.rand(2, 1, 4, 6)
    for region in (None, mask):
        gap = layers['block_t'](teacher) - layers['nonlocal_'](layers['block_s'](student))
        expected = (gap.square() * (1 if region is None else region)).sum().sqrt()
        assert torch.allclose(loss.terms(0, student, teacher, region)['nonlocal'], expected, rtol=1e-10)


def test_the_block_starts_as_the_identity_and_takes_small_maps():
    features = torch.randn(2, 4, 1, 3)
    assert torch.equal(NonLocalBlock(4, 2, 16)(features), features)


def test_region():
    student, teacher = torch.zeros(2, 3, 2, 2).double(), torch.ones(2, 3, 2, 2).double()
    mask = torch.zeros(2, 1, 2, 2)
    mask[0, :, 0, 0] = 1
    found = terms(student, teacher, mask)
    assert found['feature'] == found['nonlocal'] == pytest.approx(3**0.5) and found['spatial'] == pytest.approx(1.0)
    assert found['channel'] == pytest.approx(3**0.5)  # the second image has no cell and no mean
    teacher[0, :, 0, 0] = 5
    assert terms(student, teacher, mask)['channel'] == pytest.approx(75**0.5)  # the mean over the region alone
    assert terms(student, teacher, 4 * mask)['channel'] == pytest.approx(75**0.5)


def test_channels_may_differ():
    student, teacher = torch.randn(2, 4, 4, 4), torch.randn(2, 6, 4, 4)
    loss = build(dict(type='FBKDLoss'))
    loss(student, teacher).backward()
    assert loss.adapters[0].channel.weight.shape == (6, 4)
    assert loss.adapters[0].block_t.theta.weight.grad is not None  # the teacher's block is trained


def test_pool_one_a_level():
    loss = build(dict(type='FBKDLoss', pool=[8, 2]))
    maps = (torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4))
    loss.prepare(maps, maps)
    assert [layers.block_s.pool for layers in loss.adapters] == [8, 2]
    with pytest.raises(ValueError, match='pool has 2 entries for 1 levels'):
        build(dict(type='FBKDLoss', pool=[8, 2]))(maps[0], maps[0])


@pytest.mark.parametrize('options', [dict(tau=0), dict(feature=-1), dict(nonlocal_=float('nan')), dict(reduction=0),
                                     dict(pool=[4, 0])])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='FBKDLoss', **options))
