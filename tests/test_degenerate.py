"""What batches hold at worst: one image, one cell, one channel, no object, everything ignored, maps without contrast.

Every registered loss, region and adapter has an answer for them: finite values and gradients, connected to the student,
or a ValueError that names the class.  A new class is swept without being named here.  And what no student can learn
anything from is refused where the shapes tell, see the end.
"""

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from heads import head_config
from mmengine.registry import DefaultScope
from stock import detector, hook, make_runner, segmentor, teacher_of, train

from kd_mm.adapters.base import Adapter
from kd_mm.engine.distiller import Distiller
from kd_mm.hosts.models import build_model
from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import KDLoss
from kd_mm.losses.base.query import QueryLoss
from kd_mm.losses.mask_query import MaskQueryLoss
from kd_mm.ops.functional import align_moments, lift
from kd_mm.ops.norms import BatchNorm
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS, accepted_arguments, build, choices
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import Assignment, DenseView
from kd_mm.types.query import MaskQueryView, QueryAssignment, QueryView

LOSSES, REGIONS, ADAPTERS = choices(KDLoss), choices(RegionMask), choices(Adapter)
FRAME = (64, 80)
CLASSES = 6


@functools.lru_cache(maxsize=None)
def options_of(name):
    """Arguments that a loss needs to be built, from ``SWEEP`` beside its own tests."""
    module = MODELS.module_dict[name].__module__.rsplit('.', 1)[1]
    path = Path(__file__).parent / 'losses' / f'test_{module}.py'
    if not path.exists():
        return {}
    spec = importlib.util.spec_from_file_location(f'degenerate_{path.stem}', path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, 'SWEEP', {}).get(name, {}).get('options', {})


def make(name, **changes):
    torch.manual_seed(0)
    options = dict(options_of(name), **changes)
    if 'logits_at' in accepted_arguments(MODELS.module_dict[name]):
        options['logits_at'] = 'somewhere'
    return build(dict(type=name, **options))


def make_region(name, case):
    """A region; where it must be told pixels per cell, for the levels of the case."""
    strides = 'strides' in accepted_arguments(MODELS.module_dict[name])
    return make(name, **(dict(strides=[8 * 2**level for level in range(case.levels)]) if strides else {}))


class Case:
    """A batch: what the maps (or rows, or views) are made of.

    Args:
        shape: (N, C, H, W) of the first level.
        student, teacher: function of a shape and a seed -> values; the second None for the student's own.
        levels: how many; each next one has half the edge.
        objects: boxes of an image; None for the usual two.
        label: of the whole segmentation map; None for three classes at random, 'halves' for 0 at the left and 1 at the
            right.
        dtype: of the maps.
    """

    def __init__(self, shape=(2, CLASSES, 8, 10), student=None, teacher=None, levels=2, objects=None, label=None,
                 dtype=torch.float32):
        self.shape, self.levels, self.objects, self.label, self.dtype = shape, levels, objects, label, dtype
        self.student, self.teacher = student or noise, teacher or noise

    def pair(self, shape, seed=0):
        """Leaf of the student and tensor of the teacher."""
        own = self.student(shape, 2 * seed).to(self.dtype)
        theirs = own.clone() if self.teacher is same else self.teacher(shape, 2 * seed + 1).to(self.dtype)
        return own.requires_grad_(), theirs

    def maps(self):
        count, channels, height, width = self.shape
        return tuple(zip(*(self.pair((count, channels, max(height >> level, 1), max(width >> level, 1)), level)
                           for level in range(self.levels))))

    def boxes(self):
        usual = [[5., 6., 30., 40.], [20., 10., 50., 60.]] if self.objects is None else self.objects
        return [torch.tensor(usual).reshape(-1, 4) for _ in range(self.shape[0])]

    def batch(self, **rows):
        count, boxes = self.shape[0], self.boxes()
        draw = torch.Generator().manual_seed(3)
        labels = torch.randint(0, 3, (count, *FRAME), generator=draw)
        if self.label == 'halves':
            labels = (torch.arange(FRAME[1]) * 2 // FRAME[1]).expand(count, *FRAME).clone()
        elif self.label is not None:
            labels = torch.full((count, *FRAME), self.label)
        logits = [self.pair((count, CLASSES, max(self.shape[2] >> level, 1), max(self.shape[3] >> level, 1)), level)
                  for level in range(self.levels)]
        return KDBatch(
            input_shape=FRAME, img_shapes=[FRAME] * count, boxes=boxes,
            labels=[torch.zeros(len(found), dtype=torch.long) for found in boxes],
            masks=[torch.ones(len(found), *FRAME) for found in boxes], seg_map=labels,
            images=torch.rand(count, 3, *FRAME, generator=draw), step=10, max_steps=100,
            student_logits=tuple(own.detach() for own, _ in logits), teacher_logits=tuple(t for _, t in logits), **rows)


def noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def filled(value):
    return lambda shape, seed: torch.full(shape, float(value))


def scaled(factor):
    return lambda shape, seed: noise(shape, seed) * factor


def bounded(limit):
    """Within float16's range, and most of it near the ends."""
    return lambda shape, seed: noise(shape, seed).sign() * limit


def channel_constant(shape, seed):
    """The same in all cells of a channel: no contrast over space."""
    return noise((1, shape[1], *[1] * (len(shape) - 2)), seed).expand(shape).clone()


def cell_constant(shape, seed):
    """The same in all channels of a cell: no contrast over channels."""
    return noise((shape[0], 1, *shape[2:]), seed).expand(shape).clone()


def image_constant(shape, seed):
    """The same in all images: no contrast over the batch."""
    return noise((1, *shape[1:]), seed).expand(shape).clone()


def dead(shape, seed):
    """After a ReLU that lets nothing of the first half of the channels through."""
    values = noise(shape, seed).clamp(min=0)
    values[:, :max(shape[1] // 2, 1)] = 0
    return values


def same(shape, seed):
    raise AssertionError('a mark, see Case.pair')


CASES = dict(
    usual=Case(),
    one_image=Case((1, CLASSES, 8, 10)),
    one_cell=Case((2, CLASSES, 1, 1), levels=1),
    one_image_one_cell=Case((1, CLASSES, 1, 1), levels=1),
    one_image_one_cell_each=Case((1, CLASSES, 1, 1)),
    one_image_levels_to_one_cell=Case((1, CLASSES, 2, 2), levels=3),
    one_row=Case((2, CLASSES, 1, 10)),
    one_column=Case((2, CLASSES, 8, 1)),
    one_channel=Case((2, 1, 8, 10)),
    one_number=Case((1, 1, 1, 1), levels=1),
    one_level=Case(levels=1),
    no_rows=Case((0, CLASSES, 8, 10)),  # the maps of RoIs in a batch without objects
    no_object=Case(objects=[]),
    no_object_one_image=Case((1, CLASSES, 8, 10), objects=[]),
    empty_boxes=Case(objects=[[10., 10., 10., 10.], [30., 50., 20., 40.]]),
    boxes_outside=Case(objects=[[-50., -50., -20., -10.], [200., 300., 400., 500.]]),
    box_of_everything=Case(objects=[[0., 0., 80., 64.]]),
    all_ignored=Case(label=255),
    all_ignored_one_cell=Case((1, CLASSES, 1, 1), levels=1, label=255, objects=[]),
    one_class_of_labels=Case(label=0),
    zero=Case(student=filled(0), teacher=filled(0)),
    zero_student=Case(student=filled(0)),
    zero_teacher=Case(teacher=filled(0)),
    constant=Case(student=filled(3), teacher=filled(-2)),
    constant_one_cell=Case((1, CLASSES, 1, 1), student=filled(3), teacher=filled(3), levels=1),
    channel_constant=Case(student=channel_constant, teacher=channel_constant),
    cell_constant=Case(student=cell_constant, teacher=cell_constant),
    image_constant=Case(student=image_constant, teacher=image_constant),
    dead=Case(student=dead, teacher=dead),
    negative=Case(student=lambda shape, seed: -noise(shape, seed).abs(), teacher=lambda s, i: -noise(s, i).abs()),
    identical=Case(teacher=same),
    tiny=Case(student=scaled(1e-25), teacher=scaled(1e-25)),
    tiny_half=Case(student=scaled(1e-7), teacher=scaled(1e-7), dtype=torch.float16),
    huge=Case(student=bounded(6e4), teacher=bounded(6e4)),
    huge_against_tiny=Case(student=scaled(1e-7), teacher=bounded(6e4)),
    huge_half=Case(student=bounded(6e4), teacher=bounded(6e4), dtype=torch.float16),
    huge_constant_half=Case(student=filled(6e4), teacher=filled(-6e4), dtype=torch.float16),
    huge_one_cell=Case((1, CLASSES, 1, 1), student=bounded(6e4), teacher=bounded(6e4), levels=1),
)


# ------------------------------------------------------------------ how each kind of loss is fed


def dense_inputs(case):
    """Views of two heads with everything that a dense head may predict, and the leaves of the student."""
    leaves, sides = [], ({}, {})
    count, classes = case.shape[:2]
    labels, objects = [], []
    for level in range(case.levels):
        priors = max(case.shape[2] >> level, 1) * max(case.shape[3] >> level, 1)
        kinds = dict(logits=(classes, ), distributions=(4, 9), quality=(), boxes=(4, ))
        for index, (kind, shape) in enumerate(kinds.items()):
            own, theirs = case.pair((count, priors, *shape), 10 * level + index)
            leaves.append(own)
            for side, tensor in zip(sides, (own, theirs)):
                side.setdefault(kind, []).append(lift(tensor))
        found = torch.full((count, priors), classes)
        whose = torch.full((count, priors), -1)
        if len(case.boxes()[0] if count else ()):
            found[:, 0], whose[:, 0] = 0, 0
        if case.label == 255:
            found[:], whose[:] = classes, -1
        labels.append(found)
        objects.append(whose)
    weights = [torch.full(found.shape, float(case.label != 255)) for found in labels]
    host = Assignment(tuple(labels), tuple(weights), classes, tuple(objects))
    priors = [torch.rand(found.shape[1], 4).cumsum(dim=1) * 16 for found in labels]
    return (DenseView(**sides[0], priors=priors, assignment=host), DenseView(**sides[1], priors=priors)), leaves


def query_inputs(case):
    count, classes, height, width = case.shape
    queries, leaves, sides = height * width, [], ({}, {})
    for index, (kind, shape) in enumerate(dict(logits=(classes, ), boxes=(4, ), queries=(8, )).items()):
        own, theirs = case.pair((case.levels, count, queries, *shape), index)
        leaves.append(own)
        for side, tensor in zip(sides, (own, theirs)):
            side[kind] = lift(tensor).sigmoid() if kind == 'boxes' else lift(tensor)
    memory = [case.pair((count, 8, height, width), 7)]
    leaves += [own for own, _ in memory]
    found = torch.full((case.levels, count, queries), classes)
    objects = torch.full_like(found, -1)
    if count and len(case.boxes()[0]):
        found[:, :, 0], objects[:, :, 0] = 0, 0
    host = QueryAssignment(found, objects, classes, torch.ones(case.levels))
    return tuple(QueryView(**side, memory=[lift(pair[index]) for pair in memory], assignment=host)
                 for index, side in enumerate(sides)), leaves


def mask_inputs(case):
    count, classes, height, width = case.shape
    own, theirs = case.pair((case.levels, count, 3, classes))
    masks = case.pair((case.levels, count, 3, height, width), 1)
    return tuple(MaskQueryView(lift(logits), list(lift(layers)))
                 for logits, layers in ((own, masks[0]), (theirs, masks[1]))), [own, masks[0]]


def row_inputs(case, width=None):
    rows = case.shape[0] * case.shape[2] * case.shape[3] if len(case.boxes()[0] if case.shape[0] else ()) else 0
    own, theirs = case.pair((rows, case.shape[1] if width is None else width))
    return ((own, ), (theirs, )), [own]


def inputs(name, case):
    """((student, teacher), leaves of the student, batch) for a loss."""
    cls = MODELS.module_dict[name]
    if issubclass(cls, QueryLoss):
        pair, leaves = query_inputs(case)
    elif issubclass(cls, MaskQueryLoss):
        pair, leaves = mask_inputs(case)
    elif issubclass(cls, HeadLoss):
        pair, leaves = dense_inputs(case)
    elif cls.rows_only:
        pair, leaves = row_inputs(case, None if cls.logits else 4)
        rows = len(leaves[0])
        labels = torch.arange(rows) % max(case.shape[1], 1)
        return pair, leaves, case.batch(row_labels=labels, row_targets=torch.zeros(rows, 4), row_totals=[rows])
    else:
        pair = case.maps()
        leaves = list(pair[0])
    return pair, leaves, case.batch()


def finite(values):
    return all(torch.isfinite(value).all() for value in values if value is not None)


def outcome(name, case, region=None, steps=2):
    """'refused: ...' or the value and gradients; asserts what every loss promises."""
    loss = make(name)
    for _ in range(steps):  # a memory or running statistics show in the second
        pair, leaves, batch = inputs(name, case)
        try:
            total = loss(*pair, batch, region) if region is not None else loss(*pair, batch)
        except ValueError as error:
            assert name in str(error), f'the message does not name {name}: {error}'
            return f'refused: {error}'
        assert torch.isfinite(total), f'value {total.item()}'
        assert total.requires_grad, 'not connected to the student'
        total.backward(torch.tensor(1e-12))  # float16 gradients themselves hold 65504 only
        grads = [leaf.grad for leaf in leaves]
        assert any(grad is not None for grad in grads), 'not connected to the student'
        assert finite(grads), 'gradient of the student'
        assert finite(parameter.grad for parameter in loss.parameters()), 'gradient of the own parameters'
        assert finite(loss.state_dict().values()), 'parameters and buffers'
    return total.item(), grads


def is_head(name):
    return issubclass(MODELS.module_dict[name], HeadLoss)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', LOSSES)
def test_loss(name, case):
    if case == 'no_rows' and is_head(name):
        pytest.skip('a head predicts for images, of which there is one at least')
    outcome(name, CASES[case])


#: What a region leaves of a batch may be nothing.
REGION_CASES = ('usual', 'one_image_one_cell_each', 'no_object', 'all_ignored', 'boxes_outside', 'huge_half', 'zero')


@pytest.mark.parametrize('case', REGION_CASES)
@pytest.mark.parametrize('name', [name for name in LOSSES
                                  if not is_head(name) and not MODELS.module_dict[name].rows_only])
def test_loss_in_every_region(name, case):
    for region in REGIONS:
        try:
            outcome(name, CASES[case], make_region(region, CASES[case]), steps=1)
        except Exception as error:
            raise AssertionError(f'in {region}: {error}') from error


@pytest.mark.parametrize('case', [case for case in CASES if case != 'no_rows'])
@pytest.mark.parametrize('name', REGIONS)
def test_region(name, case):
    features = CASES[case].maps()[1]
    masks = make_region(name, CASES[case])(features, CASES[case].batch())
    assert len(masks) == len(features)
    for mask, level in zip(masks, features):
        assert mask.shape[0] == level.shape[0] and mask.shape[2:] == level.shape[2:]
        assert torch.isfinite(mask).all() and (mask >= 0).all()


#: What an adapter with options is like: all of its parts.
ADAPTER_OPTIONS = dict(
    ConvAdapter=dict(always=True, norm=True, relu=True),
    SequentialAdapter=dict(adapters=[dict(type='ConvAdapter', norm=True, always=True), dict(type='ResizeAdapter')]))


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', ADAPTERS)
def test_adapter(name, case):
    adapter, case = make(name, **ADAPTER_OPTIONS.get(name, {})), CASES[case]
    for _ in range(2):  # running statistics show in the second
        student, teacher = case.maps()
        for side in adapter(student, teacher):
            assert finite(side)
        total = sum(lift(level).sum() for level in adapter(student, teacher)[0])
        assert total.requires_grad
        total.backward(torch.tensor(1e-12))
        assert all(level.grad is not None for level in student) and finite(level.grad for level in student)
        assert finite(parameter.grad for parameter in adapter.parameters()) and finite(adapter.state_dict().values())


def test_one_value_has_no_statistics_to_remember():
    """It is its own mean: the bias comes out, and what other batches have taught stays."""
    norm = BatchNorm(2)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([1.0, -2.0]))
    norm(torch.randn(3, 2, 4, 4) * 5 + 7)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    value = torch.full((1, 2, 1, 1), 9.0, requires_grad=True)
    found = norm(value)
    assert found.flatten().tolist() == [1.0, -2.0]
    found.sum().backward()
    assert value.grad.abs().sum() == 0 and norm.bias.grad.tolist() == [1.0, 1.0]
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    norm.eval()
    assert not torch.equal(norm(value).flatten(), norm.bias)  # by what it remembers


@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (2, 3, 1, 1), (1, 3, 4, 5)])
@pytest.mark.parametrize('values', [noise, filled(2), filled(6e4)])
def test_moments_of_a_tower(shape, values):
    """CrossKD's rescaling: P7 of a small image is one cell, which has no unbiased deviation."""
    student = values(shape, 0).requires_grad_()
    found = align_moments(student, noise(shape, 1))
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(student.grad).all()


# ------------------------------------------------------------------ what teaches nothing

#: Options with which a loss is a part of itself: each alone may be the same for every student.
VARIANTS = dict(
    AICSDLoss=[dict(pixel=0.), dict(similarity=0.), dict(channel=1.), dict(matrix='released')],
    BPKDLoss=[dict(body=0.), dict(edge=0.)],
    CCLoss=[dict(normalize=False), dict(kernel='bilinear')],
    ChenClassLoss=[dict(background_weight=1.)],
    CIRKDMemoryLoss=[dict(pixel_weight=0.), dict(region_weight=0.)],
    CWDLoss=[dict(divergence='cross_entropy')],
    DISTLoss=[dict(activation='sigmoid'), dict(activation='sigmoid', gamma=0.), dict(activation='sigmoid', beta=0.),
              dict(gamma=0.), dict(beta=0.)],
    DKDLoss=[dict(alpha=0.), dict(beta=0.)],
    RKDLoss=[dict(angle_weight=0.), dict(distance_weight=0.), dict(normalize=True)],
    SKDPairwiseLoss=[dict(scale=0.5), dict(detach_norm=True, eps=1e-8)],
    SoftmaxKDLoss=[dict(divergence='cross_entropy')],
    SPLoss=[dict(norm='l1')],
    ZeroFirstOrderLoss=[dict(zero=0.), dict(first=0.)])


def slope(name, case, **options):
    """Length of the gradient that a batch gives the student, in float64; None for a refusal that names the loss."""
    loss = make(name, **options)
    pair, leaves, batch = inputs(name, case)
    try:
        total = loss(*pair, batch)
    except ValueError as error:
        assert name in str(error)
        return None
    total.backward()
    return sum(leaf.grad.square().sum().item() for leaf in leaves if leaf.grad is not None)**0.5


def random_case(*shape, **options):
    return Case(shape, dtype=torch.float64, label='halves', **options)


@pytest.mark.parametrize('classes', [1, 2])
@pytest.mark.parametrize('name', LOSSES)
def test_few_classes_are_refused_or_teach(name, classes):
    """A softmax over one class is 1, a correlation of two numbers is 1 or -1, ...: known while building."""
    standardised = [dict(standardise=True)] if 'standardise' in accepted_arguments(MODELS.module_dict[name]) else []
    for options in [{}, *VARIANTS.get(name, []), *standardised]:
        if name == 'AfDCDLoss':
            options = dict(groups=2)
        few, usual = (slope(name, random_case(2, channels, 8, 10), **options) for channels in (classes, CLASSES))
        if usual is None and options in standardised:
            continue  # heads with independent classes take no such option
        assert usual, options
        assert few is None or few > 1e-5 * usual, f'{options}: a gradient of {few} where {usual} is usual'


#: Losses that see differences between cells alone: a map of one cell teaches nothing. The dry pass cannot tell, its
#: images are smaller than those of the training. PLOP's labels are taken where a pixel is surer than the median of its
#: class, which the only one is not.
ONE_CELL = {'ATLoss', 'CanKDLoss', 'CIRKDChannelLoss', 'CIRKDMiniBatchLoss', 'CWDLoss', 'DSDLoss', 'IDDLoss',
            'IFVDLoss', 'NSTLoss', 'PLOPPseudoLabelLoss', 'RelationKLLoss', 'RKDLoss', 'SKDPairwiseLoss'}


@pytest.mark.parametrize('name', [name for name in LOSSES
                                  if not is_head(name) and not MODELS.module_dict[name].rows_only])
def test_one_cell(name):
    found, usual = (slope(name, random_case(2, CLASSES, *size)) for size in ((1, 1), (8, 10)))
    assert usual and found is not None
    assert (found <= 1e-9 * usual) == (name in ONE_CELL), f'{found}, usually {usual}'


@pytest.mark.parametrize('name', [name for name in LOSSES
                                  if 'samples' in accepted_arguments(MODELS.module_dict[name])])
def test_too_few_images_for_a_relation(name):
    """The last batch of an epoch may be one image: exactly 0, and the training goes on."""
    least = 3 if name == 'RKDLoss' else 2  # its distances are relative to their mean
    for images in range(1, 5):
        found = slope(name, random_case(images, CLASSES, 8, 10), samples='image')
        assert (found > 0) == (images >= least), images
    assert slope(name, random_case(1, CLASSES, 8, 10), samples='cell') > 0


@pytest.mark.parametrize('name', sorted(set(LOSSES)))
def test_one_image_teaches(name):
    """With its default options every loss learns at a batch size of 1."""
    assert slope(name, random_case(1, CLASSES, 8, 10))


@pytest.mark.parametrize('name', ['LDLoss', 'GOLSDLoss'])
def test_one_bin_is_refused(name):
    student = DenseView([torch.zeros(1, 2, 3)], [torch.rand(1, 2, 4)], [torch.randn(1, 2, 4, 1)], assignment=Assignment(
        [torch.tensor([[1, 3]])], [torch.ones(1, 2)], 3, [torch.tensor([[0, -1]])]))
    with pytest.raises(ValueError, match=f'{name}.*reg_max'):
        build(dict(type=name))(student, student, KDBatch(boxes=[torch.ones(1, 4)], input_shape=(8, 8)))


# ------------------------------------------------------------------ in real models

LOGIT_LOSSES = [name for name in LOSSES if MODELS.module_dict[name].logits and not is_head(name)
                and not MODELS.module_dict[name].rows_only and not hasattr(MODELS.module_dict[name], 'opponents')]


@pytest.fixture(scope='module')
def binary(cityscapes_root, tmp_path_factory):
    """A segmentor of two classes told apart by one sigmoid channel."""
    cfg = segmentor(cityscapes_root, tmp_path_factory.mktemp('binary'), classes=2)
    for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
        head.update(out_channels=1, threshold=0.3, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True))
    return cfg


def test_logit_losses_of_one_channel(binary):
    """What one channel teaches nothing stops while building, all in one message with the mend."""
    student, losses = make_runner(binary).model, {}
    for name in LOGIT_LOSSES:
        losses[f'loss_{name}'] = dict(type=name, at='@logits')
    with pytest.raises(ValueError) as caught:
        Distiller(student, teacher_of(binary), losses, scope='mmseg', teacher_ckpt='random')
    refused = {name for name in LOGIT_LOSSES if f'loss_{name}: ' in str(caught.value)}
    assert refused == {'SoftmaxKDLoss', 'DISTLoss', 'AICSDLoss', 'DKDLoss', 'MiBCELoss', 'MiBKDLoss',
                       'PLOPPseudoLabelLoss'}
    assert 'has 1 channel(s) and 2 are needed, or nothing is learned: the softmax over one class is always 1. Use ' \
        'SigmoidKDLoss or CWDLoss' in str(caught.value)
    Distiller(student, teacher_of(binary), {key: loss for key, loss in losses.items() if loss['type'] not in refused},
              scope='mmseg', teacher_ckpt='random')


def test_a_dense_detector_of_one_class():
    cfg = head_config('gfl')
    cfg.model.bbox_head.num_classes = 1
    with DefaultScope.overwrite_default_scope('mmdet'):
        student = build_model(cfg, 'mmdet')
    with pytest.raises(ValueError, match='SoftmaxKDLoss, level 0: .* has 1 channel.*SigmoidKDLoss'):
        Distiller(student, cfg, dict(loss_kd=dict(type='SoftmaxKDLoss', at='@logits')), scope='mmdet',
                  teacher_ckpt='random')


@pytest.mark.parametrize('loss', [
    dict(type='CrossKDLoss', at='bbox_head'),
    dict(type='ReviewKDLoss', at='neck'),
    dict(type='FitNetLoss', at='neck', adapter=dict(type='GraphAdapter')),
    dict(type='FitNetLoss', at='neck', adapter=dict(type='NormAdapter')),
    dict(type='FitNetLoss', at='neck', adapter=dict(type='ConvAdapter', norm=True, always=True))])
def test_training_on_one_small_image_at_a_time(loss, coco_root, tmp_path):
    """P6 and P7 of 64x64 are one cell."""
    cfg = detector(coco_root, tmp_path)
    cfg.model.bbox_head.stacked_convs = 2  # CrossKD keeps all but one the student's
    cfg.train_dataloader.batch_size = 1
    teacher = teacher_of(cfg) if loss['type'] != 'CrossKDLoss' else copy.deepcopy(cfg)
    runner, recorder = train(cfg, [hook(teacher, dict(loss_kd=loss), teacher_ckpt='random')])
    assert all(abs(value) < float('inf') for step in recorder.losses for value in step.values())
    assert finite(runner.model.state_dict().values())
