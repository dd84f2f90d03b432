"""PLOP: local POD of maps and logits, and pseudo labels."""

import torch

from kd_mm.losses.plop import (
    entropy_histogram,
    histogram_medians,
    label_entropy,
    local_pod,
    plop_labels,
)
from kd_mm.types.batch import KDBatch
from recipes.vector import Vector, recipe


@recipe('plop_local_pod')
def plop_local_pod(v: Vector) -> None:
    v.only('prepro', 'pow')
    v.only('extra_channels', 'sum', 'trim')
    v.only('normalize', False)
    v.only('difference_function', 'frobenius')
    old, new, count = v.number('num_old_classes'), v.number('num_new_classes'), v.number('num_maps')
    v.agree('num_current_classes', old + new)
    v.agree('num_maps', len(v.series('student_')))
    scales = v.number('spp_scales')
    loss = dict(type='LocalPODLoss', cells='width', growth=(old, new), scales=scales,
                extra=v.number('extra_channels'),
                schedule=v.number('use_pod_schedule'),
                loss_weight=[v.number('pod_factor') / count] * (count - 1) + [v.number('pod_factor_logits') / count])
    v.run(loss)
    v.run(dict(loss, schedule=False), prefix='variant_no_schedule_')
    v.run(dict(loss, extra='trim'), prefix='variant_trim_')
    if 'generated_embedding' not in v:
        return
    # Theirs goes cell by cell: first the means along its rows, then those along its columns.
    features = v.tensor('teacher_2').square()
    parts = []
    for scale, (rows, columns) in zip(scales, local_pod(features, scales, 'width')):
        edge = features.shape[3] // scale
        for down in range(scale):
            for across in range(scale):
                parts.append(rows[:, :, across, down * edge:(down + 1) * edge].flatten(1))
                parts.append(columns[:, :, down, across * edge:(across + 1) * edge].flatten(1))
    v.check('generated_embedding', torch.cat(parts, dim=1))


@recipe('plop_pseudo_label')
def plop_pseudo_label(v: Vector) -> None:
    v.only('classif_adaptive_min_factor', 0.0)
    v.only('eps', 1e-8)
    student, teacher, labels = v.tensor('student_0'), v.tensor('teacher_0'), v.tensor('gt_seg_map')
    old, new, ignore = teacher.shape[1], student.shape[1] - teacher.shape[1], v.number('ignore_index')
    for name, value in (('num_old_classes', old), ('num_new_classes', new), ('num_current_classes', old + new)):
        v.agree(name, value)
    bins, least = v.number('num_bins'), v.number('threshold')
    adaptive, weight = v.number('classif_adaptive_factor'), v.number('loss_weight')
    loss = dict(type='PLOPPseudoLabelLoss', threshold=least, bins=bins, median='published', entropy='published',
                adaptive=adaptive, divisor='all', loss_weight=weight)
    # The histogram of the file is that of its images, as the loss finds it in its first step.
    outcome = v.run(loss, batch=KDBatch(seg_map=labels, ignore_index=ignore))
    counts = outcome.modules['loss'].histograms[0].counts
    probabilities = teacher.softmax(dim=1)
    entropy = label_entropy(probabilities, old + new, 'published')
    v.check('generated_entropy', entropy)
    found = entropy_histogram(entropy, probabilities.argmax(dim=1), labels == 0, old + new, bins)
    v.check('histogram', found)
    assert torch.equal(found[:old], counts)
    for kind, prefix in (('published', 'generated'), ('counts', 'ext_median')):
        medians = histogram_medians(found, kind).clamp(min=least)
        v.check(f'{prefix}_thresholds', medians)
        chosen, share = plop_labels(labels, probabilities, entropy, medians, ignore)
        v.check(f'{prefix}_labels', chosen)
        if kind == 'published':
            v.check('generated_classif_factor', share)
