"""A source of teachers of one's own, in ten lines, and what it is told when it is used wrongly."""

import copy

import pytest
import torch
from stock import detector, distill_hook, hook, train

from kd_mm.registry import TEACHERS
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.sources import build_teacher
from kd_mm.teachers.spec import TeacherSpec

CWD = dict(loss_cwd=dict(type='CWDLoss', at='neck'))


@TEACHERS.register_module()
def ScaledStudent(spec, factor=0.5):  # noqa: N802  (as a config writes it)
    """The ten lines of a user: the student as it starts, every weight of its neck scaled."""
    model = copy.deepcopy(spec.student)
    with torch.no_grad():
        for parameter in model.neck.parameters():
            parameter.mul_(factor)
    return model


@TEACHERS.register_module()
class Fixed:
    """A source may be a class, too; what it gives must be a teacher."""

    def __init__(self, spec, number):
        self.number = number


@pytest.mark.parametrize('kind', ['ScaledStudent', 'kd_mm.ScaledStudent'])
def test_ten_lines_teach_in_a_real_training(coco_root, tmp_path, kind):
    det = detector(coco_root, tmp_path)
    runner, record = train(det, [hook(dict(type=kind, factor=3.0), CWD)])
    teacher = distill_hook(runner).distiller.teacher
    assert isinstance(teacher, Teacher) and not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.name == 'ScaledStudent' and teacher.runs == 3  # the first pass, then two steps
    assert all(step['loss_cwd'] > 0 for step in record.losses)
    assert not any('teacher' in key for key in runner.model.state_dict())


def test_a_function_itself_may_be_the_type():
    student = torch.nn.Sequential()
    student.neck = torch.nn.Linear(2, 2)
    teacher = build_teacher(TeacherSpec(dict(type=ScaledStudent, factor=2.0), student, classes=('a', 'b')))
    assert torch.equal(teacher.model.neck.weight, student.neck.weight * 2) and teacher.classes == ['a', 'b']


@pytest.mark.parametrize('source, message', [
    (dict(type='ScaledStudent', factro=1), "ScaledStudent has no argument 'factro'; it takes factor"),
    (dict(type='Fixed'), 'Fixed needs `number`; it takes number'),
    (dict(type='Fixed', number=1), 'Fixed gives Fixed: a source of teachers gives'),
    (dict(type='EMATeacher', decay=0.9), "EMATeacher has no argument 'decay'; it takes momentum, share"),
    (dict(type='PeerTeacher'), 'PeerTeacher needs `config`; it takes config, optim_wrapper')])
def test_wrong_use_is_told(source, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(TeacherSpec(source, torch.nn.Linear(1, 1)))
