"""Teacher files as they are found: old key names, second copies, prefixes, containers, and files that are none."""

import pickle
import re
from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from stock import detector, make_runner, retinanet_model, teacher_of
from torch import nn

from kd_mm.hosts.checkpoint import load
from kd_mm.hosts.models import build_model
from kd_mm.hosts.weights import load_weights
from kd_mm.hosts.zoo import zoo_config
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.sources import build_copy
from kd_mm.teachers.spec import TeacherSpec


@pytest.fixture(scope='module')
def det(coco_root, tmp_path_factory):
    return detector(coco_root, tmp_path_factory.mktemp('det'))


@pytest.fixture(scope='module')
def student(det):
    return make_runner(det).model


@pytest.fixture(scope='module')
def trained(det):
    """A model whose weights no new model has."""
    model = build_model(Config(teacher_of(det)), 'mmdet')
    for parameter in model.parameters():
        nn.init.uniform_(parameter)
    return model


@pytest.fixture()
def read(det, student, tmp_path):
    """Save ``content`` and build a teacher from it."""
    def build(content, strict=True, **model):
        path = tmp_path / 'found.pth'
        torch.save(content, path)
        return Teacher.build(teacher_of(det, **model), student, str(path), strict, scope='mmdet')
    return build


def equal(first, second):
    theirs = second.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in first.state_dict().items())


def below(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def test_old_names_are_converted_by_the_modules_themselves(tmp_path):
    """FCOS: `fcos_cls` of files without a version is `conv_cls` now; the host's own strict load takes such a file."""
    cfg = Config.fromfile(str(zoo_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')))
    cfg.model.backbone = dict(cfg.model.backbone, depth=18, base_channels=8, stem_channels=8, init_cfg=None)
    cfg.model.neck.in_channels = [8, 16, 32, 64]
    model = build_model(cfg, 'mmdet')
    nn.init.uniform_(model.bbox_head.conv_cls.weight)
    old = {re.sub(r'conv_(cls|reg|centerness)\.', r'fcos_\1.', key): value for key, value in model.state_dict().items()}
    assert 'bbox_head.fcos_cls.weight' in old and 'bbox_head.conv_cls.weight' not in old
    for state in (old, below('teacher.', old)):
        torch.save(dict(state_dict=state), tmp_path / 'old.pth')
        teacher = Teacher.build(cfg, model, tmp_path / 'old.pth')
        assert equal(teacher.model, model)
        assert 'has 6 keys under older names, which the model itself converts (bbox_head.fcos_cls.weight' \
            in teacher.notes[-1]


class Renamed(nn.Module):
    """Takes the weight that an older version kept beside it, as deformable convolutions of mmcv do."""

    def __init__(self, hook=False):
        super().__init__()
        self.offset = nn.Conv2d(1, 1, 1)
        self.hook = hook
        if hook:
            self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state, prefix, *_):
        for name in ('weight', 'bias'):
            if f'{prefix[:-1]}_offset.{name}' in state:
                state[f'{prefix}offset.{name}'] = state.pop(f'{prefix[:-1]}_offset.{name}')

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if not self.hook and local_metadata.get('version') is None:
            self._rename(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize('hook', [False, True])
def test_conversion_beside_the_module_and_in_hooks(hook):
    model = nn.Sequential(OrderedDict(conv=Renamed(hook)))
    state = {'conv_offset.weight': torch.full((1, 1, 1, 1), 5.0), 'conv_offset.bias': torch.zeros(1)}
    given = dict(state)
    notes = load_weights(model, dict(state_dict=state), 'x.pth')
    assert model.conv.offset.weight == 5 and 'older names' in notes[0]
    assert state == given  # the file's own dict is not changed


def test_versions_of_modules_lose_the_prefix_too():
    """A file of today must not be converted as if it were old, whatever wraps it."""
    model = nn.Sequential(OrderedDict(conv=Renamed()))
    wrapped = nn.Sequential(OrderedDict(module=model))
    seen = []
    model.conv._register_load_state_dict_pre_hook(lambda state, prefix, local, *_: seen.append(local.get('version')))
    load_weights(model, wrapped.state_dict(), 'x.pth')
    assert seen == [1]


@pytest.mark.parametrize('prefix', ['module.', 'teacher.', 'student.', 'architecture.', 'model.', 'module.net.ema.'])
def test_common_prefixes_are_taken_off(read, trained, prefix):
    teacher = read(dict(state_dict=below(prefix, trained.state_dict())))
    assert equal(teacher.model, trained)
    assert any(f'took the weights below the prefix {prefix!r}' in note for note in teacher.notes)


def test_of_two_sets_the_better_and_of_equal_ones_the_teacher(read, det, trained):
    other = build_model(Config(teacher_of(det)), 'mmdet').state_dict()
    own = trained.state_dict()
    both = read(dict(state_dict={**below('student.', other), **below('teacher.', own)}))
    assert equal(both.model, trained)
    assert re.search(r"below the prefix 'teacher\.' and left .*'student\.' would fit as well", both.notes[0])
    narrow = build_model(Config(teacher_of(det, **retinanet_model(neck=24))), 'mmdet').state_dict()
    best = read(dict(state_dict={**below('teacher.', narrow), **below('architecture.', own)}))
    assert equal(best.model, trained) and re.search(r"'architecture\.'.*they fit best \(\d+ keys", best.notes[0])


@pytest.mark.parametrize('nest', [
    lambda state: dict(ema=dict(module=state, updates=3)), lambda state: dict(state_dict_ema=state),
    lambda state: dict(model_ema=state, epoch=1), lambda state: dict(ema=dict(module=below('module.', state))),
    lambda state: dict(checkpoint=dict(net=state))], ids=['ema.module', 'state_dict_ema', 'model_ema', 'both', 'net'])
def test_containers(read, trained, nest):
    teacher = read(nest(trained.state_dict()))
    assert equal(teacher.model, trained) and 'took the weights' in teacher.notes[0]


def test_average_beside_the_weights_is_named(read, det, trained):
    other = build_model(Config(teacher_of(det)), 'mmdet').state_dict()
    teacher = read(dict(state_dict=trained.state_dict(), state_dict_ema=other))
    assert equal(teacher.model, trained) and "its 'state_dict_ema' would fit as well" in teacher.notes[0]
    # mmengine swaps both before saving: there is nothing to choose
    assert read(dict(state_dict=trained.state_dict(), ema_state_dict=below('module.', other))).notes == []


def test_second_copies_of_an_averaging_hook(read, trained):
    """mmdet 2.x keeps `ema_backbone_conv1_weight` beside the plain keys."""
    own = trained.state_dict()
    copies = {'ema_' + key.replace('.', '_'): torch.zeros_like(value) for key, value in own.items()}
    teacher = read(dict(state_dict={**own, **copies}))
    assert equal(teacher.model, trained)
    assert f'has {len(own)} second copies of weights' in teacher.notes[0] and 'plain keys' in teacher.notes[0]


def test_weights_of_one_module_go_where_they_fit(read, student, trained):
    """The mend that the strict message offers takes the backbone, and says what stays random."""
    state = dict(state_dict=trained.backbone.state_dict())
    with pytest.raises(ValueError, match=r"for 'backbone' of the model.*whole modules.*: neck, bbox_head.*"
                                         r'teacher_strict=False'):
        read(state)
    teacher = read(state, strict=False)
    assert equal(teacher.model.backbone, trained.backbone)
    assert teacher.notes[-1].endswith('random as a rule: neck, bbox_head')


def test_models_that_prefix_plain_keys_themselves(student, det, tmp_path):
    """A semi-supervised detector gives plain weights to both of its copies."""
    cfg = dict(default_scope='mmdet', model=dict(
        type='SemiBaseDetector', detector=teacher_of(det)['model'], data_preprocessor=dict(type='DetDataPreprocessor'),
        semi_train_cfg=dict(freeze_teacher=True)))
    inner = build_model(Config(teacher_of(det)), 'mmdet')
    torch.save(dict(state_dict=inner.state_dict()), tmp_path / 'plain.pth')
    teacher = Teacher.build(cfg, student, tmp_path / 'plain.pth')
    assert equal(teacher.model.student, inner) and equal(teacher.model.teacher, inner)
    # and the other way: its file for the plain detector
    torch.save(dict(state_dict=teacher.model.state_dict()), tmp_path / 'semi.pth')
    assert equal(Teacher.build(teacher_of(det), student, tmp_path / 'semi.pth', scope='mmdet').model, inner)


@pytest.mark.parametrize('strict', [True, False])
def test_files_of_which_nothing_fits_are_refused(read, trained, strict):
    with pytest.raises(ValueError, match=r"no key fits RetinaNet, whatever teacher_strict says. Its keys all begin "
                                         r"with 'net\.' \(net\.a, net\.b\); the model has backbone\.conv1"):
        read(dict(state_dict={'net.a': torch.zeros(1), 'net.b': torch.zeros(2)}), strict)
    with pytest.raises(ValueError, match='holds no weights; its entries are epoch, config'):
        read(dict(epoch=3, config='x'), strict)
    shapes = {key: torch.zeros(1, 2, 3, 4, 5) for key in trained.state_dict()}
    with pytest.raises(ValueError, match='the names are right, but all shapes are others'):
        read(shapes, strict)


def test_a_head_left_random_is_named(read, trained):
    state = {key: value for key, value in trained.state_dict().items() if not key.startswith('bbox_head.')}
    teacher = read(state, strict=False)
    assert teacher.notes[-1] == ('teacher checkpoint ' + teacher.notes[-1].split()[2] + ' gives no weights to whole '
                                 'modules, which stay as they were built, random as a rule: bbox_head')
    classes = read(trained.state_dict(), False, bbox_head=dict(num_classes=7))
    assert classes.notes[-1].endswith(': bbox_head.retina_cls')


def test_batch_counters_of_old_files_are_not_asked_for(read, trained):
    state = OrderedDict((key, value) for key, value in trained.state_dict().items() if 'num_batches' not in key)
    state._metadata = trained.state_dict()._metadata  # of a version that would have them
    assert read(dict(state_dict=state)).notes == []


def test_paths_as_objects_and_what_is_no_path(det, student, trained, tmp_path):
    path = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=trained.state_dict()), path)
    assert equal(Teacher.build(teacher_of(det), student, path, scope='mmdet').model, trained)
    assert equal(build_copy(TeacherSpec('student', student, path)).model, trained)
    for value, message in (
            (['a.pth'], r"teacher_ckpt=\['a.pth'\] is a list: .*Several teachers are given as teachers=dict"),
            (3, 'teacher_ckpt=3 is a int'), (False, "teacher_ckpt=False is a bool.*'random' for no weights"),
            ('', "teacher_ckpt='' is empty"), (tmp_path, 'is a folder, not a checkpoint. Give one file; it holds '
                                                         'plain.pth')):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Teacher.build(teacher_of(det), student, value, scope='mmdet')
    with pytest.raises(ValueError, match="teacher_strict='no' must be True or False"):
        Teacher.build(teacher_of(det), student, path, 'no', scope='mmdet')


def write_pickled(path, model):
    torch.save(model, path)


def write_script(path, model):
    torch.jit.script(model).save(str(path))


def write_pickle(path, model):
    path.write_bytes(pickle.dumps(dict(model={key: value.numpy() for key, value in model.state_dict().items()})))


def mend_pickled(path, out):
    torch.save(dict(state_dict=torch.load(path, weights_only=False).state_dict()), out)  # by the user, who trusts it


def mend_script(path, out):
    torch.save(dict(state_dict=torch.jit.load(path).state_dict()), out)


def mend_pickle(path, out):
    with open(path, 'rb') as stream:
        torch.save(pickle.load(stream), out)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('write, mend, message', [
    (write_pickled, mend_pickled, 'a whole pickled model or other Python objects'),
    (write_script, mend_script, 'a TorchScript program'), (write_pickle, mend_pickle, 'a plain pickle')],
    ids=['module', 'TorchScript', 'pickle'])
def test_other_files_and_their_mends(tmp_path, write, mend, message):
    model, path, out = nn.Conv2d(2, 3, 1), tmp_path / 'other.pkl', tmp_path / 'weights.pth'
    write(path, model)
    with pytest.raises(ValueError, match=f'cannot be loaded as a checkpoint: it (is|holds) {message}') as caught:
        load(path)
    assert 'weights_only' not in str(caught.value) and 'torch.save' in str(caught.value)
    mend(path, out)
    again = nn.Conv2d(2, 3, 1)
    load_weights(again, load(out), out)
    assert equal(again, model)


@pytest.mark.parametrize('name, content, message', [
    ('model.onnx', b'\x08\x07\x12\x07pytorch', 'an exported ONNX graph'), ('a.pth', b'', 'the file is empty'),
    ('a.pth', b'<!DOCTYPE html><html>', "begins with b'<!DOCTYPE html>"),
    ('a.safetensors', b'\x08\0\0\0\0\0\0\0{"a":{}}', 'safetensors'),
    ('cut.pth', None, 'the file is broken or cut off')])
def test_files_that_are_no_checkpoints(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        torch.save(dict(weight=torch.ones(500)), path)
        content = path.read_bytes()[:700]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load(path)
    assert 'weights_only' not in str(caught.value) and caught.value.__suppress_context__
