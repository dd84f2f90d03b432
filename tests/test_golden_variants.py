"""Vectors with the names of the repository's and other shapes and hyper-parameters: the recipes must read them too.

Each is made here from the formula, in plain torch and without kd_mm, and goes through ``tools/check_golden.py``.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import check_golden

GOLDEN = Path(__file__).parent / 'golden'
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def check(tmp_path):
    """Writes a vector from inputs and a function of them, and checks it."""

    def run(name, hyper, inputs, formula, given=None, variants=None):
        with np.load(next(GOLDEN.rglob(f'{name}.npz'))) as archive:
            meta = json.loads(str(archive['meta']))
        meta['hyper_parameters'].update(hyper)
        meta.pop('identity_check', None)
        leaves = {key: value.requires_grad_(key.startswith('student_')) for key, value in inputs.items()}
        arrays = {key: value.detach().numpy() for key, value in {**leaves, **(given or {})}.items()}
        for prefix, function in {'': formula, **(variants or {})}.items():
            numbers = function(leaves)
            arrays.update({prefix + key: torch.as_tensor(value).detach().numpy() for key, value in numbers.items()})
            if not prefix:
                names = [key for key in leaves if key.startswith('student_')]
                grads = torch.autograd.grad(numbers['loss'], [leaves[key] for key in names], allow_unused=True)
                arrays.update({f'grad_{key}': np.zeros(leaves[key].shape) if grad is None else grad.numpy()
                               for key, grad in zip(names, grads)})
        path = tmp_path / f'{name}.npz'
        np.savez(path, meta=np.array(json.dumps(meta)), **arrays)
        report = check_golden.check_file(path)
        assert report.status == 'ok', report.problems
        assert report.compared >= 2 and report.worst <= 1e-9
        return path

    return run


def draw(**shapes):
    return {name: torch.randn(shape).double() for name, shape in shapes.items()}


def pairs(shapes, teacher=None):
    """student_<i> and teacher_<i> of these shapes."""
    both = zip(shapes, shapes if teacher is None else teacher)
    return draw(**{f'{side}_{index}': shape for index, pair in enumerate(both)
                   for side, shape in zip(('student', 'teacher'), pair)})


def smaller(s, t):
    """What the authors do: by the height alone, to a square."""
    if s.shape[2] > t.shape[2]:
        s = F.adaptive_avg_pool2d(s, (t.shape[2], t.shape[2]))
    elif s.shape[2] < t.shape[2]:
        t = F.adaptive_avg_pool2d(t, (s.shape[2], s.shape[2]))
    return s, t


SIZES = [((2, 5, 8, 8), (2, 7, 4, 4)), ((1, 4, 3, 3), (1, 3, 7, 9)), ((3, 4, 5, 7), (3, 6, 5, 7)),
         ((2, 3, 9, 12), (2, 5, 6, 6))]


@pytest.mark.parametrize('student, teacher', SIZES)
@pytest.mark.parametrize('degree, offset', [(2, 0), (3, 0.5), (1, 0)])
def test_nst(check, student, teacher, degree, offset):
    def formula(x):
        s, t = (F.normalize(part.flatten(2), dim=2) for part in smaller(x['student_0'], x['teacher_0']))
        kernel = {key: (torch.einsum('nad,nbd->nab', *both) + offset)**degree
                  for key, both in dict(tt=(t, t), ss=(s, s), st=(s, t)).items()}
        return dict(loss=2.5 * (kernel['tt'].mean() + kernel['ss'].mean() - 2 * kernel['st'].mean()))

    check('nst', dict(kernel=f'polynomial d={degree} c={offset}', loss_weight=2.5), pairs([student], [teacher]),
          formula)


@pytest.mark.parametrize('student, teacher', SIZES)
def test_vid(check, student, teacher):
    inside, width = student[1], teacher[1]
    given = draw(param_regressor_0_weight=(width, inside, 1, 1), param_regressor_2_weight=(width, width, 1, 1),
                 param_regressor_4_weight=(width, width, 1, 1), param_log_scale=(width, ))

    def formula(x):
        s, t = smaller(x['student_0'], x['teacher_0'])
        for index in (0, 2, 4):
            s = F.conv2d(s.relu() if index else s, given[f'param_regressor_{index}_weight'])
        variance = (F.softplus(given['param_log_scale']) + 1e-3).view(1, -1, 1, 1)
        return dict(loss=0.7 * (0.5 * ((s - t)**2 / variance + variance.log())).mean())

    check('vid', dict(eps=1e-3, init_pred_var=2.0, loss_weight=0.7), pairs([student], [teacher]), formula, given)


@pytest.mark.parametrize('teacher', [(8, 10), (16, 20), (5, 7), (8, 12)])
def test_ofd(check, teacher):
    students, teachers = [(2, 3, 8, 10), (2, 4, 4, 5), (2, 2, 6, 6)], [(2, 5, *teacher), (2, 3, 4, 5), (2, 4, 3, 3)]
    given = {}
    for level, (s, t) in enumerate(zip(students, teachers)):
        given.update(draw(**{
            f'param_connector_{level}_conv_weight': (t[1], s[1], 1, 1), f'param_connector_{level}_bn_weight': t[1:2],
            f'param_connector_{level}_bn_bias': t[1:2], f'teacher_bn_weight_{level}': t[1:2],
            f'teacher_bn_bias_{level}': t[1:2]}))
        scale, shift = given[f'teacher_bn_weight_{level}'].abs(), given[f'teacher_bn_bias_{level}']
        normal = torch.distributions.Normal(0.0, 1.0)
        below = normal.cdf(-shift / scale)
        mean = shift - scale * normal.log_prob(shift / scale).exp() / below
        given[f'margin_{level}'] = torch.where(below > 0.001, mean, -3 * scale)

    def formula(x):
        numbers = dict(loss=0.0)
        for level in range(3):
            s = F.conv2d(x[f'student_{level}'], given[f'param_connector_{level}_conv_weight'])
            s = F.batch_norm(s, None, None, given[f'param_connector_{level}_bn_weight'],
                             given[f'param_connector_{level}_bn_bias'], training=True)
            t = F.adaptive_avg_pool2d(x[f'teacher_{level}'], s.shape[2:])
            m = given[f'margin_{level}'].view(1, -1, 1, 1)
            gap = ((s - m)**2 * ((s > m) & (t <= m)) + (s - t)**2 * ((s > t) & (t > m) & (t <= 0))
                   + (s - t)**2 * (t > 0))
            numbers[f'loss_{level}'] = gap.sum(dim=(1, 2, 3)).mean()
            numbers['loss'] += 0.02 * numbers[f'loss_{level}'] / 2**(2 - level)
        return numbers

    check('ofd', dict(feat_loss_weight=0.02), pairs(students, teachers), formula, given)


@pytest.mark.parametrize('size', [(8, 10), (7, 6)])
@pytest.mark.parametrize('pooled, stride', [(False, 2), (True, 1), (True, 3)])
def test_fbkd(check, size, pooled, stride):
    students, teachers, middle = 6, 9, 3
    given = draw(
        param_student_channel_wise_adaptation_weight=(teachers, students),
        param_student_channel_wise_adaptation_bias=(teachers, ),
        param_student_spatial_wise_adaptation_weight=(1, 1, 3, 3), param_student_spatial_wise_adaptation_bias=(1, ),
        param_student_adaptation_layers_weight=(teachers, students, 1, 1),
        param_student_adaptation_layers_bias=(teachers, ),
        param_student_non_local_adaptation_weight=(teachers, students, 1, 1),
        param_student_non_local_adaptation_bias=(teachers, ))
    for side, width in (('student', students), ('teacher', teachers)):
        for part in ('g', 'theta', 'phi'):
            given.update(draw(**{f'param_{side}_non_local_{part}_conv_weight': (width // middle, width, 1, 1),
                                 f'param_{side}_non_local_{part}_conv_bias': (width // middle, )}))
        given.update(draw(**{f'param_{side}_non_local_conv_out_conv_weight': (width, width // middle, 1, 1),
                             f'param_{side}_non_local_conv_out_bn_weight': (width, ),
                             f'param_{side}_non_local_conv_out_bn_bias': (width, )}))

    def parameters(name):
        return [given[f'param_{name}_{kind}'] for kind in ('weight', 'bias')]

    def attention(x):
        weights = (x.abs().mean(dim=1).flatten(1) / 0.3).softmax(dim=1)
        return (x.shape[2] * x.shape[3] * weights).view(len(x), 1, *x.shape[2:])

    def block(x, side):
        g, theta, phi = (F.conv2d(x, *parameters(f'{side}_non_local_{part}_conv')) for part in ('g', 'theta', 'phi'))
        if pooled:
            g, phi = (F.max_pool2d(F.max_pool2d(part, 2), stride) for part in (g, phi))
        pairwise = theta.flatten(2).transpose(1, 2) @ phi.flatten(2) / phi[0, 0].numel()
        y = (pairwise @ g.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(theta.shape)
        y = F.conv2d(y, given[f'param_{side}_non_local_conv_out_conv_weight'])
        return x + F.batch_norm(y, None, None, *parameters(f'{side}_non_local_conv_out_bn'), training=True)

    def formula(x):
        s, t = x['student_0'], x['teacher_0']
        mask = (attention(s) + attention(t)).detach() / 2
        terms = dict(
            feat=((t - F.conv2d(s, *parameters('student_adaptation_layers')))**2 * mask).sum().sqrt(),
            channel=(t.mean(dim=(2, 3)) - F.linear(s.mean(dim=(2, 3)), *parameters(
                'student_channel_wise_adaptation'))).norm(),
            spatial=(t.mean(dim=1, keepdim=True) - F.conv2d(s.mean(dim=1, keepdim=True), *parameters(
                'student_spatial_wise_adaptation'), padding=1)).norm(),
            nonlocal_=(block(t, 'teacher') - F.conv2d(block(s, 'student'), *parameters(
                'student_non_local_adaptation'))).norm())
        weights = dict(feat=0.1, channel=0.2, spatial=0.3, nonlocal_=0.4)
        numbers = {f'loss_{key.strip("_")}': term for key, term in terms.items()}
        return dict(numbers, loss=1.5 * sum(weights[key] * term for key, term in terms.items()))

    check('fbkd', dict(mask_l2_weight=0.1, channel_weight=0.2, spatial_weight=0.3, nonlocal_weight=0.4, loss_weight=1.5,
                       spatial_T=0.3, channel_T=0.9, reduction=middle, sub_sample=pooled, maxpool_stride=stride),
          pairs([(2, students, *size)], [(2, teachers, *size)]), formula, given)


def focal(s, t, beta):
    p = t.sigmoid()
    return F.binary_cross_entropy_with_logits(s, p, reduction='none') * (s.sigmoid() - p).abs()**beta


def divergence(s, t, tau):
    """(N, 4 * bins, H, W) logits split by side: tau^2 * KL of each side, (N, 4, H, W)."""
    s, t = (part.unflatten(1, (4, -1)) / tau for part in (s, t))
    return tau**2 * (t.softmax(2) * (t.log_softmax(2) - s.log_softmax(2))).sum(dim=2)


@pytest.mark.parametrize('groups, width, inside, depth, index', [
    (1, 6, 6, 2, 1), (3, 6, 4, 3, 2), (4, 8, 8, 3, 1), (8, 8, 5, 4, 3)])
def test_crosskd_head(check, groups, width, inside, depth, index):
    classes, bins = 3, 5
    given = {}
    for side in ('student', 'teacher'):
        for tower in ('cls', 'reg'):
            for step in range(depth):
                name = f'param_{side}_{tower}_convs_{step}'
                given.update(draw(**{f'{name}_conv_weight': (width, width if step else inside, 3, 3),
                                     f'{name}_gn_weight': (width, ), f'{name}_gn_bias': (width, )}))
        given.update(draw(**{
            f'param_{side}_gfl_cls_weight': (classes, width, 3, 3), f'param_{side}_gfl_cls_bias': (classes, ),
            f'param_{side}_gfl_reg_weight': (4 * bins, width, 3, 3), f'param_{side}_gfl_reg_bias': (4 * bins, ),
            f'param_{side}_scale': ()}))
    given = {name: value / math.sqrt(9 * width) if 'conv_weight' in name or 'gfl' in name else value
             for name, value in given.items()}

    def tower(x, side, kind, steps):
        for step in steps:
            name = f'param_{side}_{kind}_convs_{step}'
            x = F.relu(x) if step else x
            x = F.group_norm(F.conv2d(x, given[f'{name}_conv_weight'], padding=1), groups, given[f'{name}_gn_weight'],
                             given[f'{name}_gn_bias'])
        return x

    def predict(x, kind):
        name = f'param_teacher_gfl_{kind}'
        x = F.conv2d(F.relu(x), given[f'{name}_weight'], given[f'{name}_bias'], padding=1)
        return x * given['param_teacher_scale'] if kind == 'reg' else x

    def formula(activated):
        def value(x):
            found, theirs = {}, {}
            for kind in ('cls', 'reg'):
                s = tower(x['student_0'], 'student', kind, range(index))
                t = tower(x['teacher_0'], 'teacher', kind, range(index))
                theirs[kind] = predict(tower(t, 'teacher', kind, range(index, depth)), kind)
                s, t = (F.relu(s), F.relu(t)) if activated else (s, t)
                axes = dict(dim=(0, 2, 3), keepdim=True)
                s = (s - s.mean(**axes)) / (s.std(**axes) + 1e-6) * t.std(**axes) + t.mean(**axes)
                found[kind] = predict(tower(s, 'teacher', kind, range(index, depth)), kind)
            cls = 0.8 * focal(found['cls'], theirs['cls'], 2.0).sum() / (6.0 + EPS)
            weight = theirs['cls'].sigmoid().amax(dim=1, keepdim=True)
            reg = 3.0 * (divergence(found['reg'], theirs['reg'], 2.0) * weight).sum() / (4.0 + EPS) / weight.sum()
            numbers = dict(loss=cls + reg, loss_cls_kd=cls, loss_reg_kd=reg)
            if activated:
                numbers.update(reused_cls_0=found['cls'], reused_reg_0=found['reg'], tea_cls_0=theirs['cls'],
                               tea_reg_0=theirs['reg'])
            return numbers

        return value

    check('crosskd_head', dict(stacked_convs=depth, reused_teacher_head_idx=index, norm=f'GroupNorm groups={groups}',
                               num_classes=classes, reg_max=bins - 1, cls_beta=2.0, reg_T=2, cls_weight=0.8,
                               reg_weight=3.0, avg_factor=6.0),
          pairs([(2, inside, 6, 7)]), formula(True), given, {'variant_preactivation_': formula(False)})


@pytest.mark.parametrize('levels', [1, 3])
def test_crosskd_gfl(check, levels):
    sizes = [(7, 9), (4, 5), (2, 3)][:levels]
    shapes = [(2, 3, *size) for size in sizes] + [(2, 4 * 6, *size) for size in sizes]
    weights = [(torch.rand(2, height * width) > 0.3).double() for height, width in sizes]

    def formula(x):
        flat = [weight.view(2, 1, *size) for weight, size in zip(weights, sizes)]
        peak = [x[f'teacher_{level}'].sigmoid().amax(dim=1, keepdim=True) * flat[level] for level in range(levels)]
        numbers = dict(reg_weight_sum=sum(level.sum() for level in peak))
        for level in range(levels):
            s, t = ([x[f'{side}_{level}'], x[f'{side}_{levels + level}']] for side in ('student', 'teacher'))
            numbers[f'loss_cls_kd_{level}'] = 0.5 * (focal(s[0], t[0], 1.5) * flat[level]).sum() / (5 + EPS)
            numbers[f'loss_reg_kd_{level}'] = 2 * (divergence(s[1], t[1], 3) * peak[level]).sum() / (
                4 + EPS) / numbers['reg_weight_sum']
        return dict(numbers, loss=sum(value for name, value in numbers.items() if 'kd' in name))

    check('crosskd_gfl', dict(cls_loss_weight=0.5, cls_beta=1.5, reg_loss_weight=2.0, reg_T=3, reg_max=5, num_classes=3,
                              avg_factor=5.0), pairs(shapes), formula,
          {f'label_weights_{level}': weight for level, weight in enumerate(weights)})


def giou_gap(one, two):
    low, high = torch.maximum(one[..., :2], two[..., :2]), torch.minimum(one[..., 2:], two[..., 2:])
    both = (high - low).clamp(min=0).prod(dim=-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (one, two)) - both
    hull = (torch.maximum(one[..., 2:], two[..., 2:]) - torch.minimum(one[..., :2], two[..., :2])).prod(dim=-1)
    return 1 - both / union + (hull - union) / hull


def boxes_from(anchors, deltas, deviations, clip):
    """(N, A, 4) from deltas (N, P * 4, H, W)."""
    deltas = deltas.permute(0, 2, 3, 1).reshape(len(deltas), -1, 4) * torch.tensor(deviations, dtype=torch.float64)
    centre, size = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    limit = abs(math.log(clip))
    centre, half = centre + deltas[..., :2] * size, size * deltas[..., 2:].clamp(-limit, limit).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def some_anchors(count):
    low = torch.rand(2, count, 2).double() * 40
    return torch.cat([low, low + 4 + torch.rand(2, count, 2).double() * 30], dim=-1)


@pytest.mark.parametrize('anchors, coder', [
    (1, 'DeltaXYWH means 0, stds .1 .1 .2 .2, wh_ratio_clip 16/1000'),
    (2, 'DeltaXYWH means 0, stds 1, wh_ratio_clip 1/2')])
def test_crosskd_retinanet(check, anchors, coder):
    classes, sizes = 4, [(5, 6), (3, 3)]
    shapes = [(2, anchors * classes, *size) for size in sizes] + [(2, anchors * 4, *size) for size in sizes]
    given = {}
    for level, (height, width) in enumerate(sizes):
        given[f'anchors_{level}'] = some_anchors(height * width * anchors)
        given[f'label_weights_{level}'] = (torch.rand(2, height * width * anchors) > 0.3).double()
    deviations, clip = ([.1, .1, .2, .2], 0.016) if 'stds .1' in coder else ([1, 1, 1, 1], 0.5)

    def formula(x):
        numbers = {}
        for level in range(2):
            weight = given[f'label_weights_{level}']
            s, t = (x[f'{side}_{level}'].permute(0, 2, 3, 1).reshape(2, -1, classes) for side in ('student', 'teacher'))
            numbers[f'loss_cls_kd_{level}'] = 1.2 * (focal(s, t, 1) * weight[..., None]).sum() / (8 + EPS)
            boxes = [boxes_from(given[f'anchors_{level}'], x[f'{side}_{level + 2}'], deviations, clip)
                     for side in ('student', 'teacher')]
            numbers[f'loss_reg_kd_{level}'] = 0.6 * (giou_gap(*boxes) * t.sigmoid().amax(dim=-1) * weight).sum() / (
                8 + EPS)
        return dict(numbers, loss=sum(numbers.values()))

    check('crosskd_retinanet', dict(cls_loss_weight=1.2, cls_beta=1.0, reg_loss_weight=0.6, avg_factor=8.0,
                                    num_classes=classes, num_anchors=anchors, bbox_coder=coder),
          pairs(shapes), formula, given)


@pytest.mark.parametrize('coder, deviations', [('DeltaXYWH stds .1 .1 .2 .2', [.1, .1, .2, .2]),
                                               ('DeltaXYWH stds 0.5 0.5 1 1', [.5, .5, 1, 1])])
def test_crosskd_atss(check, coder, deviations):
    shapes = [(2, 3, 4, 5), (2, 4, 4, 5), (2, 1, 4, 5)]
    given = dict(anchors_0=some_anchors(20), label_weights_0=(torch.rand(2, 20) > 0.2).double(),
                 labels_0=torch.randint(0, 4, (2, 20)))

    def formula(x):
        weight = given['label_weights_0']
        rows = {name: value.permute(0, 2, 3, 1).reshape(2, 20, -1) for name, value in x.items()}
        boxes = [boxes_from(given['anchors_0'], x[f'{side}_1'], deviations, 0.016) for side in ('student', 'teacher')]
        numbers = dict(
            loss_cls_kd=1.1 * (focal(rows['student_0'], rows['teacher_0'], 2) * weight[..., None]).sum() / (3 + EPS),
            loss_reg_kd=1.3 * (giou_gap(*boxes) * rows['teacher_0'].sigmoid().amax(dim=-1) * weight).sum() / (3 + EPS),
            loss_center_kd=1.7 * (F.binary_cross_entropy_with_logits(
                rows['student_2'], rows['teacher_2'].sigmoid(), reduction='none')[..., 0]
                * (given['labels_0'] < 3)).sum() / (3 + EPS))
        return dict(numbers, loss=sum(numbers.values()))

    check('crosskd_atss', dict(cls_weight=1.1, reg_weight=1.3, center_weight=1.7, beta=2.0, avg_factor=3.0,
                               coder=coder), pairs(shapes), formula, given)


@pytest.mark.parametrize('tau, weight', [(1.0, 1.0), (4.0, 0.3)])
def test_dist_with_a_temperature(check, tau, weight):
    def pearson(a, b):
        a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
        return ((a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    def parts(s, t):
        s, t = s.softmax(dim=1), t.softmax(dim=1)
        return 1 - pearson(s, t), 1 - pearson(s.T, t.T)

    def formula(x):
        inter, intra = parts(x['student_0'] / tau, x['teacher_0'] / tau)
        return dict(loss=weight * tau**2 * (2 * inter + 3 * intra), loss_inter=inter, loss_intra=intra)

    def pixels(x):
        inter, intra = parts(*(x[f'{side}_1'].transpose(1, 3).reshape(-1, 4) for side in ('student', 'teacher')))
        return dict(loss=2 * inter + 3 * intra)

    check('dist', dict(beta_inter=2.0, gamma_intra=3.0, tau=tau, loss_weight=weight),
          pairs([(9, 5), (1, 4, 5, 3)]), formula, variants={'variant_seg4d_': pixels})


@pytest.mark.parametrize('weight', [1.0, 4.0])
def test_sp(check, weight):
    def formula(x):
        s, t = (F.normalize(part.flatten(1) @ part.flatten(1).T, dim=1) for part in (x['student_0'], x['teacher_0']))
        return dict(loss=weight * (s - t).square().sum() / 25)

    check('sp', dict(loss_weight=weight), pairs([(5, 3, 4, 4)], [(5, 6, 2, 3)]), formula)


@pytest.mark.parametrize('slope', [0.1, 0.3])
@pytest.mark.parametrize('norms', [(True, False), (False, True)])
def test_ft(check, slope, norms):
    given, factor = {}, 2
    for part, width, norm in zip(('translator', 'paraphraser'), (3, 7), norms):
        for index in range(3):
            at, inside, out = 3 * index, factor if index == 2 else width, factor if index else width
            given.update(draw(**{f'param_{part}_encoder_{at}_weight': (out, inside, 3, 3),
                                 f'param_{part}_encoder_{at}_bias': (out, )}))
            if norm:
                given.update(draw(**{f'param_{part}_encoder_{at + 1}_weight': (out, ),
                                     f'param_{part}_encoder_{at + 1}_bias': (out, )}))

    def encode(x, part, norm):
        for index in range(3):
            at = 3 * index
            x = F.conv2d(x, *(given[f'param_{part}_encoder_{at}_{kind}'] for kind in ('weight', 'bias')), padding=1)
            if norm:
                x = F.batch_norm(x, None, None, *(given[f'param_{part}_encoder_{at + 1}_{kind}']
                                                  for kind in ('weight', 'bias')), training=True)
            x = F.leaky_relu(x, slope)
        return x

    def formula(x):
        s = encode(x['student_0'], 'translator', norms[0])
        t = encode(x['teacher_0'], 'paraphraser', norms[1])
        gap = F.normalize(s.flatten(1), dim=1) - F.normalize(t.flatten(1), dim=1)
        return dict(loss=3.0 * gap.abs().mean(), factor_student_0=s, factor_teacher_0=t)

    check('ft', dict(loss_weight=3.0, factor_channels=factor, translator_bn=norms[0], paraphraser_bn=norms[1],
                     leaky_slope=slope), pairs([(2, 3, 5, 6)], [(2, 7, 5, 6)]), formula, given)


def test_one_image(check):
    def attention(x):
        return F.normalize(x.square().mean(dim=1).flatten(1))

    def formula(x):
        gap = attention(x['student_0']) - attention(x['teacher_0'])
        return dict(loss=50.0 * gap.square().mean())

    check('at_cirkd', dict(loss_weight=50.0), pairs([(1, 3, 4, 9)], [(1, 2, 4, 9)]), formula)


@pytest.mark.parametrize('size, pointer, stored', [((8, 12), 0, 9), ((9, 10), 21, 5), ((5, 4), 3, 50)])
def test_cirkdv2_channel(check, size, pointer, stored):
    count, inside, width, memory, keys = 3, 4, 5, 24, 11
    cells = math.ceil(size[0] / 4) * math.ceil(size[1] / 4)
    given = dict(
        draw(param_project_0_weight=(width, inside, 1, 1), param_project_bn_weight=(width, ),
             param_project_bn_bias=(width, ), param_project_3_weight=(width, width, 1, 1)),
        queue_before=F.normalize(torch.randn(memory, cells).double(), dim=1), ptr_before=torch.tensor([pointer]),
        enqueue_perm=torch.randperm(count * width), contrast_index=torch.randperm(memory)[:keys])

    def kl(s, t, tau):
        return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean() * tau**2

    def formula(x):
        s, t = (F.avg_pool2d(x[f'{side}_0'], 4, 4, ceil_mode=True) for side in ('student', 'teacher'))
        s = F.batch_norm(F.conv2d(s, given['param_project_0_weight']), None, None, given['param_project_bn_weight'],
                         given['param_project_bn_bias'], training=True).relu()
        s, t = (F.normalize(part.flatten(2), dim=2) for part in (F.conv2d(s, given['param_project_3_weight']), t))
        rows, queue = given['enqueue_perm'][:stored], given['queue_before'].clone()
        start, after = (pointer, pointer + len(rows)) if pointer + len(rows) < memory else (memory - len(rows), 0)
        queue[start:start + len(rows)] = t.flatten(0, 1)[rows]
        batch = sum(kl(s[i] @ s[j].T / 0.2, t[i] @ t[j].T / 0.2, 1) for i in range(count) for j in range(count))
        drawn = queue[given['contrast_index']]
        numbers = dict(loss_minibatch_channel=batch / count**2, loss_channel_mse=(s - t).square().mean(),
                       loss_memory_channel=kl(*(part.flatten(0, 1) @ drawn.T / 0.2 / 1.5 for part in (s, t)), 1.5),
                       queue_after=queue, ptr_after=torch.tensor([after]))
        return dict(numbers, loss=2 * numbers['loss_minibatch_channel'] + 3 * numbers['loss_memory_channel']
                    + 4 * numbers['loss_channel_mse'])

    check('cirkdv2_channel', dict(channel_contrast_size=keys, channel_memory_size=memory, channel_update_freq=stored,
                                  contrast_kd_temperature=1.5, contrast_temperature=0.2, lambda_channel_kd=4.0,
                                  lambda_memory_channel=3.0, lambda_minibatch_channel=2.0),
          pairs([(count, inside, *size)], [(count, width, *size)]), formula, given)


@pytest.mark.parametrize('eps', [1e-5, 0.1])
def test_cwd_norm(check, eps):
    given = draw(param_adapter_0_conv_weight=(4, 3, 1, 1), param_adapter_0_conv_bias=(4, ))

    def formula(x):
        s = F.conv2d(x['student_0'], given['param_adapter_0_conv_weight'], given['param_adapter_0_conv_bias'])
        s, t = (F.batch_norm(part, None, None, training=True, eps=eps).flatten(2) / 2 for part in (s, x['teacher_0']))
        return dict(loss=5 * 4 * (t.softmax(2) * (t.log_softmax(2) - s.log_softmax(2))).sum() / (3 * 4))

    check('cwd_norm', dict(tau=2.0, loss_weight=5.0, norm=f'BN affine=False track_running_stats=False eps {eps}'),
          pairs([(3, 3, 5, 4)], [(3, 4, 5, 4)]), formula, given)


def changed(name, path, **hyper):
    """A vector of the repository whose meta says more, or something else."""
    with np.load(next(GOLDEN.rglob(f'{name}.npz'))) as archive:
        arrays = {key: archive[key] for key in archive.files}
    meta = json.loads(str(arrays['meta']))
    meta['hyper_parameters'].update(hyper)
    arrays['meta'] = np.array(json.dumps(meta))
    np.savez(path / f'{name}.npz', **arrays)
    return path / f'{name}.npz'


@pytest.mark.parametrize('name', ['pkd', 'nst', 'fbkd', 'cwd_mmrazor_tau', 'crosskd_head'])
def test_a_hyper_parameter_that_no_recipe_reads_is_an_error(tmp_path, name):
    report = check_golden.check_file(changed(name, tmp_path, dropout=0.5))
    assert report.status == 'off' and 'reads less than the file says: dropout' in report.problems[-1]


@pytest.mark.parametrize('name', ['pkd', 'fgd', 'skd_pairwise_cirkd'])
def test_an_input_that_no_recipe_reads_is_an_error(tmp_path, name):
    path = changed(name, tmp_path)
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **arrays, anchor_mask=np.ones(3))
    report = check_golden.check_file(path)
    assert report.status == 'off' and 'reads less than the file says: anchor_mask' in report.problems[-1]


@pytest.mark.parametrize('name, hyper, words', [
    ('fbkd', dict(mode='gaussian'), "mode is 'gaussian'; only 'dot_product'"),
    ('crosskd_head', dict(norm='BN'), "norm is 'BN'; the recipe can read"),
    ('crosskd_atss', dict(coder='TBLR'), "coder is 'TBLR'"),
    ('mgd', dict(student_channels=9), 'student_channels is 9, and the arrays say 5'),
    ('fgd', dict(num_levels=3), 'num_levels is 3, and the arrays say 2'),
    ('rkd', dict(squared=True), 'squared is True; only False'),
    ('fgd', dict(adapter='an MLP'), "adapter is 'an mlp'"),
])
def test_what_a_recipe_cannot_do_is_said(tmp_path, name, hyper, words):
    report = check_golden.check_file(changed(name, tmp_path, **hyper))
    assert report.status == 'off' and words in report.problems[0]


@pytest.mark.parametrize('name, hyper', [
    ('crosskd_head', dict(norm='GroupNorm groups=4')), ('fbkd', dict(sub_sample=False)),
    ('cwd_norm', dict(norm='BN affine=False track_running_stats=False eps 1e-3')), ('ft', dict(leaky_slope=0.2)),
    ('nst', dict(kernel='polynomial d=3 c=0')), ('crosskd_atss', dict(coder='DeltaXYWH stds 1 1 1 1')),
    ('crosskd_retinanet', dict(bbox_coder='DeltaXYWH means 0, stds .1 .1 .2 .2, wh_ratio_clip 16/1000')),
    ('sp', dict(loss_weight=2.0)), ('maskd', dict(weight_mask=False)), ('dist', dict(tau=2.0)),
])
def test_a_hyper_parameter_changes_the_numbers(tmp_path, name, hyper):
    assert check_golden.check_file(changed(name, tmp_path, **hyper)).status == 'off'
