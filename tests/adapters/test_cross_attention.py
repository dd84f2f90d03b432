import pytest
import torch

from kd_mm.adapters.cross_attention import CrossAttentionAdapter, grid_code


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adapter(**options):
    return CrossAttentionAdapter(**dict(dict(channels=8, heads=2), **options))


def test_every_cell_sees_every_cell():
    made, student = adapter(), torch.randn(1, 3, 4, 5).double().requires_grad_()
    (found, ), _ = made((student, ), (torch.zeros(1, 6, 3, 3).double(), ))
    assert found.shape == (1, 6, 3, 3)
    slope, = torch.autograd.grad(found[0, :, 0, 0].sum(), student)
    assert (slope.abs().sum(dim=1) > 0).all()


def test_all_parameters_are_trained():
    made, student = adapter(), torch.randn(2, 3, 4, 5)
    made((student, ), (torch.zeros(2, 6, 4, 5), ))[0][0].square().sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in made.parameters())
    # A bias of all keys alike changes no softmax.
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in made.named_parameters() if 'key.bias' not in name)


def test_the_place_counts():
    """Two students whose cells are exchanged give other features, not the same ones exchanged."""
    made, student = adapter(), torch.randn(1, 3, 4, 4).double()
    teacher = torch.zeros(1, 6, 4, 4).double()
    turned = made((student.flip(3), ), (teacher, ))[0][0].flip(3)
    assert not torch.allclose(turned, made((student, ), (teacher, ))[0][0], rtol=1e-3)


def test_who_asks_from_where_counts():
    """Of a map that is its own mirror both halves have the same cell; what they ask of it differs by their place."""
    made, half = adapter(), torch.randn(1, 3, 2, 2).double()
    student = torch.cat([half, half.flip(3)], dim=3)
    found = made((student, ), (torch.zeros(1, 6, 1, 2).double(), ))[0][0]
    assert not torch.allclose(found[..., 0], found[..., 1], rtol=1e-3)


def test_places_do_not_depend_on_how_fine_a_grid_is():
    coarse, fine = grid_code(1, 2, 8, torch.zeros(1).double()), grid_code(3, 6, 8, torch.zeros(1).double())
    fine = fine.view(3, 6, 8)
    torch.testing.assert_close(coarse[0], fine[1, 1])  # the centre of the left half
    torch.testing.assert_close(coarse[1], fine[1, 4])
    assert len(fine.flatten(0, 1).unique(dim=0)) == 18
    assert grid_code(2, 2, 3, torch.zeros(1)).abs().sum() == 0


def test_the_size_may_change_and_the_widths_may_not():
    made = adapter()
    for size in ((4, 5), (7, 3)):
        assert made((torch.zeros(1, 3, *size), ), (torch.zeros(1, 6, 2, 2), ))[0][0].shape == (1, 6, 2, 2)
    with pytest.raises(ValueError, match='prepared for 3 and 6 channels'):
        made((torch.zeros(1, 4, 2, 2), ), (torch.zeros(1, 6, 2, 2), ))


@pytest.mark.parametrize('options, message', [
    (dict(channels=9), 'channels=9 must be a multiple of heads=2'), (dict(heads=0), 'heads=0'),
    (dict(ratio=0), 'ratio=0')])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        adapter(**options)
