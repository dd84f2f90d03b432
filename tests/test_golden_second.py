"""The second batch of golden vectors with other shapes and hyper-parameters, as tests/test_golden_variants.py does."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_golden import check_golden
from test_golden_variants import GOLDEN, check, draw, pairs  # noqa: F401  (check is a fixture)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def z_scores(logits):
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


@pytest.mark.parametrize('tau, weight, classes', [(1.0, 0.5, 3), (4.0, 9.0, 11)])
def test_kd_logit_std(check, tau, weight, classes):  # noqa: F811
    def divergence(s, t):
        return weight * tau**2 * F.kl_div((s / tau).log_softmax(1), (t / tau).softmax(1), reduction='batchmean')

    check('kd_logit_std', dict(temperature=tau, loss_weight=weight, num_classes=classes), pairs([(5, classes)]),
          lambda x: dict(loss=divergence(z_scores(x['student_0']), z_scores(x['teacher_0'])),
                         generated_student_logits=z_scores(x['student_0'])),
          variants={'variant_plain_': lambda x: dict(loss=divergence(x['student_0'], x['teacher_0']))})


@pytest.mark.parametrize('alpha, beta, tau', [(2.0, 0.5, 1.0), (0.3, 6.0, 3.0)])
def test_dkd_logit_std(check, alpha, beta, tau):  # noqa: F811
    labels = torch.tensor([0, 3, 3, 1])

    def formula(x, a=alpha, b=beta):
        p, q = ((z_scores(x[f'{side}_0']) / tau).softmax(1) for side in ('teacher', 'student'))
        rows = torch.arange(4)
        hit_p, hit_q = p[rows, labels], q[rows, labels]
        target = hit_p * (hit_p / hit_q).log() + (1 - hit_p) * ((1 - hit_p) / (1 - hit_q)).log()
        other = torch.ones_like(p, dtype=torch.bool)
        other[rows, labels] = False
        rest_p, rest_q = (part[other].view(4, -1) / (1 - hit)[:, None] for part, hit in ((p, hit_p), (q, hit_q)))
        return dict(loss=tau**2 * (a * target + b * (rest_p * (rest_p / rest_q).log()).sum(1)).mean())

    check('dkd_logit_std', dict(alpha=alpha, beta=beta, temperature=tau, num_classes=5), pairs([(4, 5)]), formula,
          dict(gt_labels_0=labels), {'variant_tckd_': lambda x: formula(x, b=0.0),
                                     'variant_nckd_': lambda x: formula(x, a=0.0)})


@pytest.mark.parametrize('name, student, shapes, pool, eps', [
    ('cankd', 5, [(2, 5, 4, 7)], True, 1e-3), ('cankd', 4, [(1, 4, 3, 3), (3, 4, 5, 2), (2, 4, 6, 6)], False, 1e-5),
    ('cankd_align', 3, [(2, 7, 5, 5), (2, 7, 4, 6)], True, 1e-4)])
def test_cankd(check, name, student, shapes, pool, eps):  # noqa: F811
    channels, inner, given = shapes[0][1], 2, {}
    for level in range(len(shapes)):
        for role, (out, width) in dict(theta=(inner, channels), phi=(inner, channels), g=(inner, channels),
                                       W=(channels, inner)).items():
            given.update(draw(**{f'param_{level}_{role}_weight': (out, width, 1, 1),
                                 f'param_{level}_{role}_bias': (out, )}))
        given.update(draw(**{f'param_{level}_bn_weight': (channels, ), f'param_{level}_bn_bias': (channels, )}))
        if name == 'cankd_align':
            given.update(draw(**{f'param_{level}_align_weight': (channels, student, 1, 1),
                                 f'param_{level}_align_bias': (channels, )}))

    def formula(x):
        total = 0
        for level in range(len(shapes)):
            def conv(features, role, level=level):
                return F.conv2d(features, *(given[f'param_{level}_{role}_{part}'] for part in ('weight', 'bias')))

            s, t = x[f'student_{level}'], x[f'teacher_{level}']
            s = conv(s, 'align') if name == 'cankd_align' else s
            keys, values = conv(t, 'phi'), conv(t, 'g')
            if pool:
                keys, values = F.max_pool2d(keys, 2), F.max_pool2d(values, 2)
            pairs_of = conv(s, 'theta').flatten(2).transpose(1, 2) @ keys.flatten(2) / keys[0, 0].numel()
            mixed = (pairs_of @ values.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(len(s), inner, *s.shape[2:])
            normed = F.batch_norm(conv(mixed, 'W'), None, None, given[f'param_{level}_bn_weight'],
                                  given[f'param_{level}_bn_bias'], True, eps=2 * eps)
            gap = F.instance_norm(normed + s, eps=eps) - F.instance_norm(t, eps=eps)
            total = total + 3.0 * 0.5 * gap.square().mean()
        return dict(loss=total)

    hyper = dict(loss_weight=3.0, in_channels=channels, student_channels=student, teacher_channels=channels,
                 inter_channels=inner, sub_sample=pool, bn_eps=2 * eps, instance_norm_eps=eps, num_levels=len(shapes))
    owns = [(shape[0], student, *shape[2:]) for shape in shapes]
    check(name, hyper, pairs(owns, shapes), formula, given)


def projected(x, given):
    return F.conv2d(x['student_0'], given['param_projector_weight'][:, :, None, None], given['param_projector_bias'])


@pytest.mark.parametrize('name, student, teacher', [
    ('dsi', (1, 4, 3, 8), (1, 6, 7, 5)), ('dsi_same_size', (3, 2, 4, 4), (3, 3, 4, 4))])
def test_dsi(check, name, student, teacher):  # noqa: F811
    given = draw(param_projector_weight=(teacher[1], student[1]), param_projector_bias=(teacher[1], ))

    def formula(x):
        t = x['teacher_0']
        if t.shape[2:] != student[2:]:
            t = F.interpolate(t, size=student[2:], mode='bilinear', align_corners=False)
        gap = 1 - F.cosine_similarity(projected(x, given), t, dim=1).mean()
        return dict(loss=7.0 * gap, loss_cosine=gap)

    check(name, dict(loss_weight=7.0, student_channels=student[1], teacher_channels=teacher[1]),
          pairs([student], [teacher]), formula, given)


def test_gam(tmp_path):
    rows = [(4.0, 3.0, 5.0, 0.5, 9.0, 0), (4.0, 4.6, 5.0, 0.5, 9.0, 0), (4.0, 8.0, 5.0, 0.5, 9.0, 0),
            (4.0, 8.0, 5.0, 0.5, 9.0, 1), (4.0, 0.0, 5.0, 0.5, 9.0, 0), (0.0, 3.0, 5.0, 0.5, 9.0, 0),
            (4.0, 0.01, 5.0, 0.5, 9.0, 0), (4.0, 95.0, 5.0, 0.5, 9.0, 0)]
    table = dict(zip(('gam_weight_before', 'gam_share', 'gam_rho', 'gam_delta', 'gam_default_weight',
                      'gam_final_phase'), map(np.array, zip(*rows))))

    def ratio(x, y):
        return min(max(y * (1 - x) / (x * (1 - y)), 0.5), 4.0)

    after = [4 * ratio(0.03, 0.055), 4.0, 4 * ratio(0.08, 0.045), 9.0, 9.0, 0.0, 16.0, 2.0]
    with np.load(GOLDEN / 'det' / 'gam.npz') as archive:
        meta = json.loads(str(archive['meta']))
    meta['hyper_parameters'].update(ratio_min=0.5, ratio_max=4.0)
    for right in (True, False):
        np.savez(tmp_path / 'gam.npz', meta=np.array(json.dumps(meta)), loss=sum(after),
                 generated_weight_after=np.array(after) + (not right), **table)
        assert (check_golden.check_file(tmp_path / 'gam.npz').status == 'ok') == right


@pytest.mark.parametrize('student, teacher, tau', [
    ((1, 4, 6, 5), (1, 6, 3, 4), 0.5), ((3, 2, 4, 4), (3, 3, 4, 4), 0.1)])
def test_relation_kl(check, student, teacher, tau):  # noqa: F811
    given = draw(param_projector_weight=(teacher[1], student[1]), param_projector_bias=(teacher[1], ))

    def formula(x):
        s = projected(x, given)
        if s.shape[2:] != teacher[2:]:
            s = F.interpolate(s, size=teacher[2:], mode='bilinear', align_corners=False)
        s, t = (F.normalize(side.flatten(2), dim=1) for side in (s, x['teacher_0']))
        own, theirs = (side.transpose(1, 2) @ side for side in (s, t))
        log_s, log_t = ((side / tau).log_softmax(2) for side in (own, theirs))
        return dict(loss=2.0 * (log_t.exp() * (log_t - log_s)).sum(2).mean(), generated_student_relation=own[0])

    check('relation_kl', dict(temperature=tau, loss_weight=2.0, student_channels=student[1],
                              teacher_channels=teacher[1]), pairs([student], [teacher]), formula, given)


@pytest.mark.parametrize('images, size', [(1, 4), (3, 5), (4, 3)])
def test_queue_kl(check, images, size):  # noqa: F811
    given = draw(param_projector_weight=(6, 4), param_projector_bias=(6, ))
    given['queue_before'] = F.normalize(torch.randn(size, 6).double(), dim=1)
    given['queue_before'][-1] = 0

    def formula(x):
        s = F.normalize(x['student_0'] @ given['param_projector_weight'].t() + given['param_projector_bias'], dim=1)
        t = F.normalize(x['teacher_0'], dim=1)
        queue = torch.cat([t, given['queue_before']])[:size]
        log_s, log_t = ((side @ queue.t() / 0.3).log_softmax(1) for side in (s, t))
        return dict(loss=1.5 * (log_t.exp() * (log_t - log_s)).sum(1).mean(), generated_queue=queue)

    check('queue_kl', dict(temperature=0.3, loss_weight=1.5, queue_size=size, student_channels=4, teacher_channels=6),
          pairs([(images, 4)], [(images, 6)]), formula, given)


@pytest.mark.parametrize('old, new, images', [(2, 1, 1), (3, 4, 3)])
def test_mib(check, old, new, images):  # noqa: F811
    labels = torch.randint(0, old + new, (images, 5, 6))
    labels[0, 0, :3] = 250

    def ce(x):
        p = x['student_0'].softmax(1)
        merged = torch.cat([p[:, :old].sum(1, keepdim=True), p[:, old:]], dim=1)
        picked = merged.log().gather(1, (labels.clamp(max=old + new - 1) - old + 1).clamp(min=0)[:, None])[:, 0]
        return -(picked * (labels != 250))

    logits = (images, old + new, 5, 6)
    inputs = draw(student_0=logits)
    check('mib_ce', dict(num_old_classes=old, num_new_classes=new, ignore_index=250, loss_weight=3.0), inputs,
          lambda x: dict(loss=3.0 * ce(x).mean()), dict(gt_seg_map=labels, gt_seg_map_no_ignore=labels % (old + new)),
          {'variant_mean_': lambda x: dict(loss=ce(x).sum() / (labels != 250).sum()),
           'variant_sum_': lambda x: dict(loss=ce(x).sum())})

    def kd(x, alpha=0.7):
        p, q = (alpha * x['teacher_0']).softmax(1), x['student_0'].softmax(1)
        merged = torch.cat([q[:, :1] + q[:, old:].sum(1, keepdim=True), q[:, 1:old]], dim=1)
        return -(p * merged.log()).sum(1) / old

    mask = (labels != 250).double()
    check('mib_kd', dict(num_old_classes=old, num_new_classes=new, alpha=0.7, loss_weight=4.0),
          draw(student_0=logits, teacher_0=(images, old, 5, 6)), lambda x: dict(loss=4.0 * kd(x).mean()),
          dict(gt_seg_map=labels, mask_0=mask),
          {'variant_alpha1_': lambda x: dict(loss=kd(x, 1.0).mean()),
           'variant_mask_': lambda x: dict(loss=(kd(x) * mask).mean())})


@pytest.mark.parametrize('old, new, scales, maps, schedule', [
    (3, 2, [1, 2], [(4, 6, 6), (2, 9, 6)], True), (2, 3, [1, 3], [(5, 6, 7), (3, 5, 6), (4, 8, 6)], False)])
def test_plop_local_pod(check, old, new, scales, maps, schedule):  # noqa: F811
    teachers = [(2, *shape) for shape in maps] + [(2, old, 7, 7)]
    students = [(2, *shape) for shape in maps] + [(2, old + new, 7, 7)]

    def embed(features):
        parts, width = [], features.shape[3]
        for scale in scales:
            edge = width // scale
            for down in range(scale):
                for across in range(scale):
                    cell = features[:, :, down * edge:(down + 1) * edge, across * edge:(across + 1) * edge]
                    parts += [cell.mean(3).flatten(1), cell.mean(2).flatten(1)]
        return torch.cat(parts, dim=1)

    def formula(x):
        total, count = 0, len(students)
        for index in range(count):
            s, t = x[f'student_{index}'], x[f'teacher_{index}']
            if index == count - 1:
                s = torch.cat([s[:, :1] + s[:, old:].sum(1, keepdim=True), s[:, 1:old]], dim=1)
            factor = (0.3 if index < count - 1 else 0.02) * (math.sqrt((old + new) / new) if schedule else 1.0)
            total = total + factor * (embed(t**2) - embed(s**2)).norm(dim=1).mean() / count
        numbers = dict(loss=total)
        if len(maps) >= 3:
            numbers['generated_embedding'] = embed(x['teacher_2']**2)
        return numbers

    check('plop_local_pod', dict(
        pod_factor=0.3, pod_factor_logits=0.02, spp_scales=scales, num_old_classes=old, num_new_classes=new,
        num_current_classes=old + new, use_pod_schedule=schedule, num_maps=len(students)),
        pairs(students, teachers), formula)


@pytest.mark.parametrize('old, new, bins, adaptive', [(3, 1, 50, True), (2, 3, 200, False)])
def test_plop_pseudo_label(check, old, new, bins, adaptive):  # noqa: F811
    labels = torch.randint(0, old + new, (2, 12, 13))
    labels[:, :, :5] = 0
    labels[1, 2] = 250
    inputs = draw(student_0=(2, old + new, 12, 13), teacher_0=(2, old, 12, 13))
    inputs['teacher_0'] *= 2

    def formula(x):
        p = x['teacher_0'].softmax(1)
        best = p.argmax(1)
        u = -(p * (p + 1e-8).log()).mean(1) / math.log(old + 1e-8) / math.log(old + new)
        limits = []
        for label in range(old):
            counts = np.zeros(bins)
            for value in u[(labels == 0) & (best == label)].tolist():
                counts[min(int(value * bins), bins - 1)] += 1
            run, half, found = 0, counts.sum() / 2, 0.0
            for index, count in enumerate(counts):
                if run <= half <= run + count and counts.sum():
                    found = index / bins + (half - run) / count / bins
                    break
                run += index
            limits.append(max(0.01, found))
        candidate = (labels < old)
        sure = candidate & (u < torch.tensor(limits).double()[best])
        chosen = torch.where(sure, best, torch.where(candidate, 250, labels))
        factor = (sure.flatten(1).sum(1) / (candidate.flatten(1).sum(1).double() + 1e-6)) if adaptive else torch.ones(2)
        loss = F.cross_entropy(x['student_0'], chosen, reduction='none', ignore_index=250)
        return dict(loss=(factor.double()[:, None, None] * loss).mean() * 2.5, generated_labels=chosen)

    check('plop_pseudo_label', dict(
        threshold=0.01, num_bins=bins, num_old_classes=old, num_new_classes=new, num_current_classes=old + new,
        ignore_index=250, classif_adaptive_factor=adaptive, loss_weight=2.5), inputs, formula, dict(gt_seg_map=labels))


@pytest.mark.parametrize('old, new, bins, strides, tau', [(2, 1, 5, [4], 3.0), (4, 2, 9, [8, 16, 32], 10.0)])
def test_erd(check, old, new, bins, strides, tau):  # noqa: F811
    sizes = [(2, 24 // (2**index), 20 // (2**index)) for index in range(len(strides))]
    students = [(n, old + new, h, w) for n, h, w in sizes] + [(n, 4 * bins, h, w) for n, h, w in sizes]
    teachers = [(n, old, h, w) for n, h, w in sizes] + [(n, 4 * bins, h, w) for n, h, w in sizes]
    inputs = pairs(students, teachers)
    for index in range(len(strides)):
        inputs[f'teacher_{index}'] -= 2
    steps = torch.arange(bins).double()

    def rows(x, side, first):
        return torch.cat([x[f'{side}_{first + index}'].flatten(2).transpose(1, 2) for index in range(len(strides))], 1)

    def iou(a, b):
        low, high = torch.maximum(a[:2], b[:2]), torch.minimum(a[2:], b[2:])
        inside = (high - low).clamp(min=0).prod()
        return inside / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside)

    def formula(x):
        a, b = (rows(x, side, 0)[..., :old] for side in ('student', 'teacher'))
        p, q = (rows(x, side, len(strides)).unflatten(2, (4, bins)) for side in ('student', 'teacher'))
        points = torch.cat([torch.stack([torch.arange(w).repeat(h), torch.arange(h).repeat_interleave(w)], 1) * stride
                            for (_, h, w), stride in zip(sizes, strides)]).double()
        far = q.softmax(3) @ steps
        total = 0
        for image in range(2):
            best, kind = b[image].sigmoid().max(1)
            inside = best > best.mean() + 2 * best.std()
            total = total + 0.5 * (a[image][inside] - b[image][inside]).square().mean()
            top = q[image].flatten(1).amax(1)
            sure = (top > top.mean() + 2 * top.std()).nonzero()[:, 0].tolist()
            boxes = torch.cat([points - far[image][:, :2], points + far[image][:, 2:]], 1)
            kept = []
            for one in sorted(sure, key=lambda index: -best[index]):
                if all(kind[one] != kind[other] or iou(boxes[one], boxes[other]) <= 0.2 for other in kept):
                    kept.append(one)
            log_t, log_s = ((side[image][kept] / tau).log_softmax(2) for side in (q, p))
            gaps = tau**2 * (log_t.exp() * (log_t - log_s)).mean(2)
            weight = a[image][kept].detach().sigmoid().amax(1)
            total = total + 0.5 * 0.4 * (gaps * weight[:, None]).sum() / (4 + 1.1920928955078125e-07)
        return dict(loss=total)

    check('erd', dict(dist_loss_weight=0.5, ld_loss_weight=0.4, T=tau, reg_max=bins - 1, num_old_classes=old,
                      num_new_classes=new, strides=strides, num_levels=len(strides), nms_iou_threshold=0.2), inputs,
          formula)
