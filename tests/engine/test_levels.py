import pytest
import torch

from kd_mm.engine.levels import pair_levels
from kd_mm.ops.classes import common_classes, take_classes


def maps(*edges):
    return tuple(torch.zeros(2, 3, edge, edge) for edge in edges)


@pytest.mark.parametrize('student, teacher, expected', [
    (maps(32, 16, 8, 4, 2), maps(64, 32, 16, 8, 4), [(0, 1), (1, 2), (2, 3), (3, 4)]),
    (maps(64, 32, 16, 8, 4), maps(32, 16, 8, 4, 2), [(1, 0), (2, 1), (3, 2), (4, 3)]),
    (maps(64, 32, 16, 8), maps(32, 16, 8, 4, 2), [(1, 0), (2, 1), (3, 2)]),
    (maps(8, 16, 32), maps(32, 16, 8), [(0, 2), (1, 1), (2, 0)]),
    (maps(32, 16), maps(32, 16), [(0, 0), (1, 1)]),
    (maps(8), maps(16), [(0, 0)]),  # one level each: an adapter resizes
    (maps(8, 8), maps(16, 16), [(0, 0), (1, 1)]),  # stages of dilated backbones
    (maps(9, 5), maps(8, 4), [(0, 0), (1, 1)]),  # no size in common
    (maps(9, 5, 3), maps(8, 4), None),
    (maps(8, 8, 8), maps(8, 8), None),
    ((torch.zeros(7, 5), ), (torch.zeros(7, 5), ), [(0, 0)]),
])
def test_pairs(student, teacher, expected):
    assert pair_levels(student, teacher) == expected


def test_common_classes():
    assert common_classes(['a', 'b', 'c'], ['c', 'x', 'a']) == ([0, 2], [2, 0])
    assert common_classes(['a', 'b', 'c'], ['c', 'x', 'a'], ['c']) == ([2], [0])
    with pytest.raises(ValueError, match='the teacher does not know b; it has c, x, a'):
        common_classes(['a', 'b'], ['c', 'x', 'a'], ['b'])
    with pytest.raises(ValueError, match=r'no class name in common. Student: a. Teacher: b'):
        common_classes(['a'], ['b'])


def test_take_classes():
    logits = torch.arange(2 * 6 * 2.).view(2, 6, 1, 2)
    taken = take_classes(logits, 3, [2, 1])
    assert torch.equal(taken, logits[:, [2, 1, 5, 4]])
    rows = torch.arange(8.).view(2, 4)
    assert torch.equal(take_classes(rows, 3, [1]), rows[:, [1, 3]])  # the background stays
    assert torch.equal(take_classes(rows, 4, [1]), rows[:, [1]])
    with pytest.raises(ValueError, match='7 logits are not those of 3 classes'):
        take_classes(torch.zeros(1, 7, 2, 2), 3, [0])
