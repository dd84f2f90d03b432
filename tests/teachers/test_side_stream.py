"""The teacher beside the student, on streams of a device that is not there."""

import pytest
import torch
from chains import Chain, settle
from streams import Streams
from torch import nn

from kd_mm.hosts.taps import Tap
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.side_stream import SideStream
from kd_mm.teachers.speed import Speed, speed_of
from kd_mm.types.batch import KDBatch


class FakeSide(SideStream):

    def record(self, tensor, stream):  # a CPU tensor knows no streams
        self.streams.record(tensor, stream)


def steps(leave_out='', count=3):
    """Some steps of a teacher beside a student; ``leave_out`` breaks the order on purpose."""
    model, student = settle(Chain()), nn.Conv2d(3, 8, 3, padding=1)
    teacher = Teacher(model, student)
    teacher.go(Speed(fold=True, channels_last=True, stream=True, chosen=True))
    tap, batch = Tap(model, 'act', 'teacher'), KDBatch(input_shape=(16, 20))
    teacher.run(torch.randn(2, 3, 16, 20), (), [tap], batch, full=True)
    tap.read()
    teacher.run(torch.randn(2, 3, 16, 20), (), [tap], batch)  # the check
    tap.read()
    api, results = Streams(), []
    side = teacher.fast.side = FakeSide(torch.device('cpu'), api)
    with api, torch.no_grad():
        for _ in range(count):
            images = torch.rand(2, 3, 16, 20) * 2
            if leave_out == 'wait':
                side._stream = side._stream or api.Stream(None)
                side._stream.wait_stream = lambda other: None
            if leave_out == 'record':
                side.record = lambda tensor, stream: None
            teacher.run(images, (), [tap], batch)
            record = tap.read()
            own = student(images)
            for _ in range(0 if leave_out == 'join' else 2):  # once more does nothing
                teacher.fast.join([record])
            results.append((own - record[0]).mean())
            del record, own, images
    return api, teacher, results


def test_the_order_is_kept_by_events_alone():
    api, teacher, results = steps()
    assert not api.races, api.races
    assert api.log == ['side waits for main', 'event on side'] * 3
    assert all(torch.isfinite(value) for value in results)
    assert not hasattr(api, 'synchronize')  # nothing has asked for it


@pytest.mark.parametrize('leave_out, race', [
    ('wait', 'on side reads what main has not finished'), ('join', 'on main reads what side has not finished'),
    ('record', 'memory freed')])
def test_the_look_out_sees_what_is_left_out(leave_out, race):
    api, _, _ = steps(leave_out)
    assert any(race in text for text in api.races), api.races


def test_it_is_for_cuda():
    with pytest.raises(ValueError, match='stream=True is for CUDA, and it is on cpu'):
        speed_of('teacher', dict(stream=True), torch.device('cpu'))
    assert speed_of('teacher', dict(stream=True), torch.device('cuda')).stream
    assert not speed_of('teacher', 'auto', torch.device('cuda')).stream
