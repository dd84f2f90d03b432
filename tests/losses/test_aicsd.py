import math

import pytest
import torch
from tensors import Given, draw

from kd_mm.losses.aicsd import inter_class_divergence, released_similarity
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch


def value(student, teacher, batch=None, region=None, **options):
    return build(dict(type='AICSDLoss', **options))(student, teacher, batch, region).item()


def example():
    """Distributions of three classes over two cells: (3/4, 1/4), (1/2, 1/2), (1/4, 3/4)."""
    return torch.tensor([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]]).log().view(1, 3, 1, 2).double()


def test_closed_form_of_the_matrix():
    near = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # (3/4, 1/4) to even
    back = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)  # even to (3/4, 1/4)
    far = 0.5 * math.log(3)
    norm = math.hypot(near, far)
    rows = inter_class_divergence(example())[0]
    assert rows[0].tolist() == pytest.approx([0.0, near / norm, far / norm])
    assert rows[1].tolist() == pytest.approx([0.5**0.5, 0.0, 0.5**0.5])
    assert rows[2].tolist() == pytest.approx([far / norm, near / norm, 0.0])
    assert back != near
    assert torch.allclose(inter_class_divergence(example() + draw(1, 3, 1, 1))[0], rows)


def test_closed_form_of_the_terms():
    student, teacher = draw(2, 3, 2, 4), draw(2, 3, 2, 4, seed=1)
    gap = inter_class_divergence(student) - inter_class_divergence(teacher)
    assert value(student, teacher, similarity=5.0, pixel=0.0) == pytest.approx(5 * gap.square().mean().item())
    pixel = build(dict(type='SoftmaxKDLoss', tau=2.0))(student, teacher).item() / 3
    assert value(student, teacher, similarity=0.0, pixel=7.0, tau=2.0) == pytest.approx(7 * pixel)
    channel = build(dict(type='ICKDLoss'))(student, teacher).item()
    assert value(student, teacher, similarity=0.0, pixel=0.0, channel=3.0) == pytest.approx(3 * channel)
    both = value(student, teacher, similarity=5.0, pixel=0.0) + value(student, teacher, similarity=0.0, pixel=7.0)
    assert value(student, teacher, similarity=5.0, pixel=7.0) == pytest.approx(both)


def test_released():
    # One column of two rows, so the softmax over the height is the whole distribution.
    logits = example().transpose(2, 3)
    p = logits.softmax(dim=2).flatten(2)[0]
    plain = torch.empty(3, 3).double()
    for low in range(3):
        for high in range(low, 3):
            plain[low, high] = plain[high, low] = (p[high] * (p[high].log() - p[low])).sum()
    expected = plain / plain.norm(dim=1, keepdim=True)
    assert torch.allclose(released_similarity(logits), expected)
    assert torch.allclose(released_similarity(logits.repeat(2, 1, 1, 1)), expected)
    wide = torch.cat([logits, logits], dim=3)  # each column has its own distribution
    assert torch.allclose(released_similarity(wide), expected)
    other, teacher = draw(2, 3, 3, 4), draw(2, 3, 3, 4, seed=1)
    gap = (released_similarity(other) - released_similarity(teacher)).square().mean().item()
    found = value(other, teacher, matrix='released', similarity=8.0, pixel=0.0)
    assert found == pytest.approx(8 * gap / 2) and gap > 1e-4
    with pytest.raises(ValueError, match='no region'):
        value(other, other, KDBatch(), Given(torch.ones(2, 1, 3, 4)), matrix='released')


def test_even_distributions_keep_their_digits():
    logits = 1e-2 * draw(1, 4, 64, 64)
    single = inter_class_divergence(logits.float()).double()
    assert torch.allclose(single, inter_class_divergence(logits), atol=2e-2)


@pytest.mark.parametrize('options', [{}, dict(similarity=0.0, pixel=0.0, channel=1.0)])
def test_ignored_pixels_and_region(options):
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    expected = value(student[..., 2:], teacher[..., 2:], **options)
    seg_map = torch.zeros(2, 4, 6, dtype=torch.uint8)
    seg_map[:, :, :2] = 255
    assert value(student, teacher, KDBatch(seg_map=seg_map), **options) == pytest.approx(expected, rel=1e-10)
    unmasked = value(student, teacher, KDBatch(seg_map=seg_map), mask_ignored=False, **options)
    assert unmasked == pytest.approx(value(student, teacher, **options), rel=1e-12)
    mask = (seg_map != 255).double()[:, None]
    assert value(student, teacher, KDBatch(), Given(mask), **options) == pytest.approx(expected, rel=1e-10)
    mask[1] = 0
    expected = value(student[:1, ..., 2:], teacher[:1, ..., 2:], **options)
    assert value(student, teacher, KDBatch(), Given(mask), **options) == pytest.approx(expected, rel=1e-10)


def test_rows_are_refused():
    with pytest.raises(ValueError, match='needs maps'):
        value(draw(4, 3), draw(4, 3))


@pytest.mark.parametrize('options', [dict(similarity=-1), dict(pixel=-1), dict(channel=float('nan')), dict(tau=0),
                                     dict(matrix='mine')])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build(dict(type='AICSDLoss', **options))
