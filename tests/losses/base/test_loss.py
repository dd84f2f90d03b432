"""Properties that every registered loss has; a new loss is swept without being named here.

A loss that needs arguments, or that lacks a property on purpose, says so beside its own tests: ``SWEEP`` in
``test_<method>.py`` maps its name to ``options`` and to ``skip``, test name -> reason.
"""

import copy
import functools
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from kd_mm.losses.base.head import HeadLoss
from kd_mm.losses.base.loss import KDLoss
from kd_mm.regions import GTBoxRegion
from kd_mm.regions.base import RegionMask
from kd_mm.registry import MODELS, build, choices
from kd_mm.types.batch import KDBatch
from kd_mm.types.dense import Assignment, DenseView
from kd_mm.types.query import MaskQueryView, QueryAssignment, QueryView

#: A loss on whole heads takes views of them, see test_ld.py; one on rows of proposals no maps, see test_chen.py.
NAMES = [name for name in choices(KDLoss)
         if not issubclass(MODELS.module_dict[name], HeadLoss) and not MODELS.module_dict[name].rows_only]
MAPS = ((2, 6, 8, 10), (2, 6, 4, 5))


class Everywhere(RegionMask):
    """The same weight in every cell."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, features, batch):
        return tuple(torch.full_like(tensor[:, :1], self.value, dtype=torch.float32) for tensor in features)


def make_batch(**changes):
    fields = dict(
        input_shape=(64, 80),
        img_shapes=[(60, 80), (64, 72)],
        boxes=[torch.tensor([[5., 6., 30., 40.], [20., 10., 50., 60.]]), torch.tensor([[0., 0., 12., 12.]])],
        labels=[torch.tensor([0, 1]), torch.tensor([1])],
        seg_map=torch.randint(0, 3, (2, 64, 80), generator=torch.Generator().manual_seed(3)),
        step=10, max_steps=100)
    fields.update(changes)
    return KDBatch(**fields)


def make_features(scale=1.0, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(shape, generator=draw, dtype=torch.float64) * scale).to(dtype) for shape in MAPS)


def make_pair(**options):
    student = tuple(tensor.requires_grad_() for tensor in make_features(seed=1, **options))
    return student, make_features(seed=2, **options)


@functools.lru_cache(maxsize=None)
def sweep_of(name):
    """The loss's entry in ``SWEEP`` of its own test file; an empty dict if there is none."""
    method = MODELS.module_dict[name].__module__.rsplit('.', 1)[1]
    path = Path(__file__).resolve().parents[1] / f'test_{method}.py'
    spec = importlib.util.spec_from_file_location(f'sweep_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, 'SWEEP', {}).get(name, {})


@pytest.fixture(autouse=True)
def exceptions(request):
    name = getattr(request.node, 'callspec', None) and request.node.callspec.params.get('name')
    reason = sweep_of(name).get('skip', {}).get(request.node.originalname) if name else None
    if reason:
        pytest.skip(reason)


def make_loss(name, **arguments):
    torch.manual_seed(0)
    return build(dict(dict(type=name, **sweep_of(name).get('options', {})), **arguments), KDLoss, 'loss')


def ideal(loss):
    """MGD reaches 0 only when the generator and the mask let everything through, DIST without what it adds to norms."""
    if hasattr(loss, 'eps'):
        loss.eps = 1e-12
    for generator in getattr(loss, 'generators', []):
        conv = torch.nn.Conv2d(6, 6, 1, bias=False).to(generator[0].weight.dtype)
        torch.nn.init.dirac_(conv.weight)
        generator[0], generator[1], generator[2] = conv, torch.nn.Identity(), torch.nn.Identity()
    loss.mask_ratio = 0.0


JOINT = {name for name in NAMES if MODELS.module_dict[name].joint}


@pytest.mark.parametrize('name', NAMES)
def test_zero_for_equal_inputs(name):
    loss, features = make_loss(name), make_features(dtype=torch.float64)
    loss.prepare(features, features)
    ideal(loss)
    assert abs(loss(features, features, make_batch()).item()) < 1e-9
    student, teacher = make_pair(dtype=torch.float64)
    assert loss(student, teacher, make_batch()).item() > 1e-9


@pytest.mark.parametrize('name', NAMES)
def test_gradient_reaches_the_student_and_the_own_parameters_only(name):
    loss, (student, teacher) = make_loss(name), make_pair()
    teacher = tuple(tensor.requires_grad_() for tensor in teacher)
    loss.prepare(student, teacher)
    for parameter in loss.parameters():  # FGD's last convolution starts at 0 and blocks those before it
        torch.nn.init.normal_(parameter, std=0.5)
    loss(student, teacher, make_batch()).backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in student)
    assert all(tensor.grad is None for tensor in teacher)
    assert all(parameter.grad is not None for parameter in loss.parameters() if parameter.requires_grad)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_range_is_finite(name, dtype):
    loss, (student, teacher) = make_loss(name), make_pair(scale=1.5e4, dtype=dtype)
    total = loss(student, teacher, make_batch())
    assert total.dtype == torch.float32 and torch.isfinite(total)
    assert all(parameter.dtype == torch.float32 for parameter in loss.parameters())
    total.backward(torch.tensor(1e-12))  # the half gradients themselves may only hold 65504
    assert all(torch.isfinite(tensor.grad).all() for tensor in student)


@pytest.mark.parametrize('name', NAMES)
def test_half_precision_is_lifted_first(name):
    loss, (student, teacher) = make_loss(name), make_pair(dtype=torch.float16)
    lifted = loss(tuple(s.float() for s in student), tuple(t.float() for t in teacher), make_batch())
    assert torch.equal(loss(student, teacher, make_batch()), lifted)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher, make_batch()), lifted)


@pytest.mark.parametrize('name', NAMES)
def test_float64_stays_float64(name):
    loss, (student, teacher) = make_loss(name), make_pair(dtype=torch.float64)
    assert loss(student, teacher, make_batch()).dtype == torch.float64
    assert loss(student, teacher, make_batch(), GTBoxRegion()).dtype == torch.float64
    assert all(parameter.dtype == torch.float64 for parameter in loss.parameters())


@pytest.mark.parametrize('name', NAMES)
def test_float32_agrees_with_float64(name):
    loss, (student, teacher) = make_loss(name), make_pair()
    loss.prepare(student, teacher)
    single = loss(student, teacher, make_batch())
    wide = loss.double()(tuple(s.double() for s in student), tuple(t.double() for t in teacher), make_batch())
    assert torch.isclose(single.double(), wide, rtol=1e-5)


@pytest.mark.parametrize('name', sorted(set(NAMES) - JOINT))
def test_weights_of_levels_and_schedules(name):
    loss, (student, teacher) = make_loss(name), make_pair(dtype=torch.float64)
    batch = make_batch()
    terms = loss.per_level(student, teacher, batch)
    assert len(terms) == (1 if loss.joint else 2)
    factors = [2.0, 0.5][:len(terms)]
    weighted = copy.deepcopy(loss)
    weighted.weight = make_loss(name, loss_weight=factors).weight
    expected = sum(factor * term for factor, term in zip(factors, terms))
    assert torch.isclose(weighted(student, teacher, batch), expected, rtol=1e-12)
    wrong = copy.deepcopy(loss)
    wrong.weight = make_loss(name, loss_weight=[1.0, 2.0, 3.0]).weight
    with pytest.raises(ValueError, match=f'3 entries.*{len(terms)} levels'):
        wrong(student, teacher, batch)
    scheduled = copy.deepcopy(loss)
    scheduled.weight = make_loss(name, loss_weight=dict(type='CosineSchedule', final=0.0)).weight
    expected = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 0.1, dtype=torch.float64))) * sum(terms)
    assert torch.isclose(scheduled(student, teacher, batch), expected, rtol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_empty_region_is_zero_and_connected(name):
    loss, (student, teacher) = make_loss(name), make_pair()
    total = loss(student, teacher, make_batch(), Everywhere(0.0))
    assert abs(total.item()) < 1e-6  # a divergence of equal rows, where nothing is left, may be rounded
    total.backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in student)


@pytest.mark.parametrize('name', NAMES)
def test_full_region_is_no_region(name):
    loss, (student, teacher) = make_loss(name), make_pair(dtype=torch.float64)
    batch = make_batch()
    whole = loss(student, teacher, batch)
    assert torch.isclose(loss(student, teacher, batch, Everywhere(1.0)), whole, rtol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_no_boxes_is_finite(name):
    loss, (student, teacher) = make_loss(name), make_pair()
    batch = make_batch(boxes=[torch.zeros(0, 4)] * 2, labels=[torch.zeros(0, dtype=torch.long)] * 2)
    for region in (None, GTBoxRegion(), GTBoxRegion(mode='scale'), GTBoxRegion(mode='background')):
        total = loss(student, teacher, batch, region)
        assert torch.isfinite(total)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, student))
    boxed = make_batch(boxes=[make_batch().targets.boxes[0], torch.zeros(0, 4)])
    assert torch.isfinite(loss(student, teacher, boxed, GTBoxRegion()))


@pytest.mark.parametrize('name', NAMES)
def test_outside_of_the_region_nothing_counts(name):
    loss, (student, teacher) = make_loss(name), make_pair(dtype=torch.float64)
    batch, region = make_batch(), GTBoxRegion()
    masks = region(student, batch)
    moved = tuple(s + 3 * (1 - m) * torch.randn(s.shape, dtype=s.dtype) for s, m in zip(student, masks))
    assert torch.isclose(loss(moved, teacher, batch, region), loss(student, teacher, batch, region), rtol=1e-12)
    assert not torch.isclose(loss(moved, teacher, batch), loss(student, teacher, batch), rtol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_shape_errors_name_level_shapes_and_mend(name):
    loss, (student, teacher) = make_loss(name), make_pair()
    with pytest.raises(ValueError, match=f'{name}: 1 student levels and 2 teacher levels'):
        loss(student[:1], teacher, make_batch())
    wide = (teacher[0], torch.cat([teacher[1]] * 2, dim=1))
    if loss.same_channels:
        mend = 'same classes' if loss.logits else 'ConvAdapter'
        with pytest.raises(ValueError, match=rf'{name}, level 1: student \(2, 6, 4, 5\).*\(2, 12, 4, 5\).*{mend}'):
            loss(student, wide, make_batch())
    large = (torch.cat([teacher[0]] * 2, dim=3), teacher[1])
    if loss.same_size:
        with pytest.raises(ValueError, match=rf'{name}, level 0: .*\(2, 6, 8, 20\).*ResizeAdapter'):
            loss(student, large, make_batch())
    with pytest.raises(ValueError, match='not outputs of the same kind'):
        loss(student, (teacher[0][:1], teacher[1]), make_batch())


@pytest.mark.parametrize('name', NAMES)
def test_prepare_twice_changes_nothing(name):
    loss, (student, teacher) = make_loss(name), make_pair()
    loss.prepare(student, teacher)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss.prepare(student, teacher)
    loss(student, teacher, make_batch())
    assert before.keys() == loss.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize('name', NAMES)
def test_the_layout_of_memory_changes_nothing(name):
    """Maps whose channels lie innermost: some operators of the hosts read them in the wrong order."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        loss, pair = make_loss(name), make_pair()
        student, teacher = (tuple(tensor.detach().clone(memory_format=torch.preserve_format).contiguous(
            memory_format=layout) for tensor in side) for side in pair)
        for tensor in student:
            tensor.requires_grad_()
        torch.manual_seed(0)
        loss.prepare(student, teacher)
        value = loss(student, teacher, make_batch())
        found.append((value, *torch.autograd.grad(value, student, allow_unused=True)))
    for usual, innermost in zip(*found):
        torch.testing.assert_close(innermost, usual, rtol=1e-4, atol=1e-6)


def test_a_single_tensor_is_one_level():
    loss, (student, teacher) = make_loss('CWDLoss'), make_pair()
    assert torch.equal(loss(student[0], teacher[0]), loss(student[:1], teacher[:1]))


#: What a `Reduction:` line is made of; what each word means stands in CONTRIBUTING.md.
COUNTED = ('elements', 'cells', 'channels', 'classes', 'images', 'levels', 'pairs', 'triples', 'rows', 'priors',
           'sides', 'instances', 'queries', 'positives', 'weights')
THINGS = rf'(?:{"|".join(COUNTED)})(?:, (?:{"|".join(COUNTED)}))*'
REDUCTION = re.compile(rf'(?P<unit>per level|all levels); (?:mean over {THINGS}|'
                       rf'(?P<sum>sum|root of the sum) over {THINGS}; (?P<divisor>divided by {THINGS}|not divided))')


def reductions(name):
    """The `Reduction:` lines of a loss, parsed: one for each term that is reduced in a way of its own."""
    returns = inspect.getdoc(MODELS.module_dict[name]).split('\nReturns:\n')[1].split('\n\n')[0]
    lines = [line.strip().removeprefix('Reduction: ') for line in returns.splitlines()
             if line.strip().startswith('Reduction: ')]
    assert lines, f'{name}: `Returns:` has no line `Reduction: ...`'
    found = [REDUCTION.fullmatch(line) for line in lines]
    assert all(found), f'{name}: {lines} is not made of {REDUCTION.pattern}'
    return found


@pytest.mark.parametrize('name', choices(KDLoss))
def test_the_docstring_is_complete(name):
    text = MODELS.module_dict[name].__doc__
    for part in ('Args:', 'Returns:', 'Example:', 'loss_weight:'):
        assert part in text, part
    unit = 'all levels' if MODELS.module_dict[name].joint else 'per level'
    assert {line['unit'] for line in reductions(name)} == {unit}


def test_every_word_of_a_reduction_is_explained():
    text = (Path(__file__).resolve().parents[3] / 'CONTRIBUTING.md').read_text()
    table = text.split('What is counted')[1].split('\n\n')[1]
    words = [word for row in table.splitlines()[2:] for word in re.findall(r'`(\w+)`', row.split('|')[1])]
    assert sorted(words) == sorted(COUNTED)


@pytest.mark.parametrize('line', [
    'per image; mean over elements', 'per level; mean over everything', 'per level; sum over elements',
    'per level; mean over elements; divided by images', 'per level; sum over elements; divided by N'])
def test_other_words_are_no_reduction(line):
    assert not REDUCTION.fullmatch(line)


@pytest.mark.parametrize('name', NAMES)
def test_the_batch_twice_is_what_the_reduction_says(name):
    """What is divided by a count does not grow with the batch; a sum does, and its root by the root of 2.

    Within a few per cent: other masks and samples are drawn, and some divide by one less than the count.
    """
    loss, (student, teacher) = make_loss(name), make_pair(dtype=torch.float64)
    loss.prepare(student, teacher)
    batch = make_batch()
    once = batch.targets
    twice = make_batch(boxes=once.boxes * 2, labels=once.labels * 2, img_shapes=list(once.img_shapes) * 2,
                       seg_map=torch.cat([once.seg_map] * 2))
    undivided = {line['sum'] if line['divisor'] == 'not divided' else 'mean' for line in reductions(name)}
    factor, = {{'mean': 1.0, 'sum': 2.0, 'root of the sum': 2**0.5}[kind] for kind in undivided}
    both = [tuple(torch.cat([tensor] * 2) for tensor in side) for side in (student, teacher)]
    expected = factor * copy.deepcopy(loss)(student, teacher, batch)
    assert torch.isclose(copy.deepcopy(loss)(*both, twice), expected, rtol=0.05)


def dense_views():
    """A view of two levels and a teacher's, with all that a head may have; the student's knows its objects."""
    labels = (torch.tensor([[0, 1, 3, 3], [1, 3, 3, 3]]), torch.tensor([[1, 3], [3, 3]]))
    objects = tuple(torch.where(level < 3, level.clamp(max=1) * (torch.arange(len(level)) == 0)[:, None], -1)
                    for level in labels)
    host = Assignment(labels, tuple(torch.ones(level.shape) for level in labels), 3, objects, torch.tensor(4.0))
    corners = torch.tensor([[0., 0., 30., 40.], [20., 10., 50., 60.], [4., 4., 30., 44.], [0., 0., 12., 12.]])
    views = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)

        def rows(*shape, draw=draw):
            return [torch.randn(*level.shape, *shape, generator=draw, dtype=torch.float64) for level in labels]

        boxes = [(corners[:level.shape[1]] + torch.rand(*level.shape, 4, generator=draw)).double() for level in labels]
        views.append(DenseView(rows(3), boxes, rows(4, 5), rows(), [corners[:4].double(), corners[2:].double()],
                               host if seed == 1 else None))
    return views


def query_views():
    """Two decoder layers, five queries, and the encoder's maps; the teacher's assignment is known."""
    found = QueryAssignment(torch.tensor([[[0, 1, 3, 3, 3], [1, 3, 3, 3, 3]]] * 2),
                            torch.tensor([[[0, 1, -1, -1, -1], [0, -1, -1, -1, -1]]] * 2), 3, torch.tensor(3.0))
    views = []
    for seed in (1, 2):
        draw = torch.Generator().manual_seed(seed)
        logits, queries, memory = (torch.randn(shape, generator=draw, dtype=torch.float64)
                                   for shape in ((2, 2, 5, 3), (2, 2, 5, 8), (2, 8, 4, 5)))
        boxes = 0.2 + 0.2 * torch.rand(2, 2, 5, 4, generator=draw, dtype=torch.float64)
        views.append(QueryView(logits, boxes, queries, memory=[memory], assignment=found if seed == 2 else None))
    return views


def mask_views():
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return [MaskQueryView(torch.randn(2, 2, 5, 4, generator=draw, dtype=torch.float64),
                          torch.randn(2, 2, 5, 8, 10, generator=draw, dtype=torch.float64)) for draw in draws]


def food(loss, batch):
    """A student, a teacher and a batch that every loss of its kind can be given."""
    if isinstance(loss, HeadLoss):
        return (*{DenseView: dense_views, QueryView: query_views, MaskQueryView: mask_views}[loss.compares](), batch)
    student, teacher = make_pair(dtype=torch.float64)
    if loss.rows_only:
        columns = 4 if 'Box' in type(loss).__name__ else 6
        student, teacher = (side[0].detach().flatten()[:8 * columns].view(8, columns) for side in (student, teacher))
        batch = KDBatch(row_labels=torch.arange(8) % 6, row_targets=torch.zeros(8, 4), row_totals=[8])
    return student, teacher, batch


def named_parts(name):
    """The names of the `Parts:` line of a loss; [''] without one."""
    lines = re.findall(r'^ *Parts: (.*)$', inspect.getdoc(MODELS.module_dict[name]).split('\nReturns:\n')[1], re.M)
    assert len(lines) <= 1 and all(re.fullmatch(r'[a-z0-9]+(, [a-z0-9]+)+', line) for line in lines), lines
    return lines[0].split(', ') if lines else ['']


@pytest.mark.parametrize('name', choices(KDLoss))
def test_the_parts_are_those_of_the_docstring_and_sum_to_the_total(name):
    loss = make_loss(name, loss_weight=2.0)
    student, teacher, batch = food(loss, make_batch())
    if not isinstance(loss, HeadLoss):
        loss.prepare(*((side, ) if isinstance(side, torch.Tensor) else side for side in (student, teacher)))
        loss.double()

    def found():
        return copy.deepcopy(loss).parts(student, teacher, batch)

    levels, names = found(), named_parts(name)
    assert all(list(level) == names for level in levels)
    assert set(loss.factors) <= set(names)
    expected = sum(sum(level.values()) * weight for level, weight in zip(levels, loss.weight.at(10, 100, len(levels))))
    assert torch.isclose(copy.deepcopy(loss)(student, teacher, batch), expected, rtol=1e-12)
    ones = dict.fromkeys(loss.factors, 1.0)
    loss.factors = dict(ones)
    plain = found()
    for changed in ones:  # a factor belongs to its part alone, once
        loss.factors = dict(ones, **{changed: 3.0})
        for before, after in zip(plain, found()):
            for part in names:
                expected = before[part] * loss.factors.get(part, 1.0)
                assert torch.isclose(after[part], expected, rtol=1e-10), (changed, part)


@pytest.mark.parametrize('name, off', [
    ('LDLoss', dict(valuable_weight=0)), ('BCKDLoss', dict(box_weight=0)), ('CrossKDLoss', dict(quality_weight=0)),
    ('DETRDistillLogitsLoss', dict(giou_weight=0)), ('DETRDistillQueryPriorLoss', dict(l1_weight=0)),
    ('KDDETRLoss', dict(class_weight=0)), ('MaskQueryLoss', dict(dice_weight=0)), ('RKDLoss', dict(angle_weight=0)),
    ('ICDLoss', dict(auxiliary=0)), ('FTLoss', dict(reconstruction_weight=0))])
def test_a_part_that_is_off_is_not_computed(name, off):
    loss = make_loss(name, **off)
    argument, = off
    part = argument.removesuffix('_weight')
    student, teacher, batch = food(loss, make_batch())
    for level in loss.parts(student, teacher, batch):
        assert set(level) == set(named_parts(name)) - {part}


def test_without_any_part_there_is_a_zero_with_a_gradient():
    loss, (student, teacher) = make_loss('RKDLoss', distance_weight=0, angle_weight=0), make_pair()
    total = loss(student, teacher, make_batch())
    total.backward()
    assert total.item() == 0 and all(tensor.grad.abs().sum() == 0 for tensor in student)
