"""A batch in parts: how what was recorded of them is joined."""

import pytest
import torch

from kd_mm.teachers.chunk import join, part_of, plan
from kd_mm.types.records import Call, Recorded


def record(*tensors, calls=()):
    result = Recorded(tensors)
    result.calls, result.owner, result.memo = tuple(calls), 'owner', {}
    return result


def test_data_samples_go_with_their_images():
    assert part_of([1, 2, 3], slice(1, 3)) == [2, 3] and part_of((1, 2), slice(0, 1)) == (1, )
    assert part_of(dict(a=1), slice(0, 1)) == dict(a=1) and part_of(None, slice(0, 1)) is None


def test_calls_are_joined_with_everything_in_them():
    x = torch.arange(12.0).view(3, 4)

    def of(part):
        return record(x[part], calls=[Call((x[part], 7), dict(key=x[part] + 1), dict(maps=[x[part] * 2], same=x[0]))])

    along = plan(of(slice(0, 3)), [of(slice(index, index + 1)) for index in range(3)])
    found = join([of(slice(0, 2)), of(slice(2, 3))], along)
    call, = found.calls
    assert torch.equal(found[0], x) and torch.equal(call.args[0], x) and call.args[1] == 7
    assert torch.equal(call.kwargs['key'], x + 1) and torch.equal(call.output['maps'][0], x * 2)
    assert torch.equal(call.output['same'], x[0]) and found.owner == 'owner' and found.memo == {}


@pytest.mark.parametrize('whole, parts, message', [
    ([torch.zeros(2, 3)], [[torch.zeros(1, 3)] * 2] * 2, '1 tensors for the whole batch and 2 for one image'),
    ([torch.zeros(2, 3)], [[torch.zeros(2, 3)], [torch.ones(2, 3)]], 'the same shape for every number of images, and '),
    ([torch.zeros(2, 3)], [[torch.zeros(3)], [torch.zeros(3)]], r'is \[\(3,\), \(3,\)\] for its images'),
    ([torch.zeros(2, 6)], [[torch.zeros(1, 3)], [torch.zeros(1, 3)]], r'is \[\(1, 3\), \(1, 3\)\]')])
def test_what_cannot_be_joined(whole, parts, message):
    with pytest.raises(ValueError, match=message):
        plan(record(*whole), [record(*part) for part in parts])
