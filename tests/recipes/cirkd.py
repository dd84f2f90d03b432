"""Cross-image relations: mini-batch and memory."""

import torch

from recipes.vector import Vector, identical_loss, recipe


@recipe('cirkd_minibatch')
def cirkd_minibatch(v: Vector) -> None:
    loss = dict(type='CIRKDMiniBatchLoss', tau=v.number('temperature'), loss_weight=v.number('loss_weight'))
    v.run(loss)
    v.run(dict(loss, max_block=100))  # two rows at a time
    v.check('loss_identical', identical_loss(v, loss))


@recipe('cirkd_memory')
def cirkd_memory(v: Vector) -> None:
    classes, ignored = v.number('num_classes'), v.number('ignore_label', default=255)
    batch = v.batch()
    batch.targets.ignore_index = ignored
    loss = dict(
        type='CIRKDMemoryLoss', num_classes=classes, tau=v.number('contrast_temperature'),
        kd_tau=v.number('contrast_kd_temperature'), pixel_memory=v.number('pixel_memory_size'),
        region_memory=v.number('region_memory_size'), pixels_per_image=v.number('pixel_update_freq'),
        pixel_keys=v.number('pixel_contrast_size'), region_keys=v.number('region_contrast_size'),
        pixel_weight=v.number('lambda_memory_pixel'), region_weight=v.number('lambda_memory_region'))
    for kind in ('pixel', 'region'):
        v.agree(f'{kind}_contrast_size', len(v.tensor(f'{kind}_index')))
    labels = v.tensor('label_at_feature').long().flatten(1)
    cells = torch.zeros(len(labels), classes, v.number('pixel_update_freq'), dtype=torch.long)
    for image, label, count, order in zip(v.tensor('enqueue_image'), v.tensor('enqueue_class'),
                                          v.tensor('enqueue_count'), v.tensor('enqueue_perm')):
        inside = (labels[image] == label).nonzero()[:, 0]
        cells[image, label, :count] = inside[order[:count]]

    def setup(modules):
        method = modules['loss']
        for kind, queue in method.queues[0].items():
            queue.vectors.copy_(v.tensor(f'{kind}_queue_before'))
            queue.pointer.copy_(v.tensor(f'{kind}_ptr_before'))
        method.fixed_cells = [cells]
        method.fixed_slots = [{kind: v.tensor(f'{kind}_index') for kind in ('pixel', 'region')}]

    rules = [(r'project_([03])_weight', r'loss.projections.0.\1.weight'),
             (r'project_bn_(weight|bias)', r'loss.projections.0.1.\1')]
    for prefix, enqueue in (('', 'published'), ('fixed_', 'class')):
        outcome = v.run(dict(loss, enqueue=enqueue), rules=rules, setup=setup, prefix=prefix, batch=batch)
        method = outcome.modules['loss']
        for kind, term in method.terms(0, outcome.student[0], outcome.teacher[0], batch).items():
            v.check(f'{prefix}loss_{kind}', term)
        v.check(f'{prefix}pixel_queue_after', method.queues[0]['pixel'].vectors)
        v.check('region_queue_after', method.queues[0]['region'].vectors)
        for kind in ('pixel', 'region'):
            v.check(f'{kind}_ptr_after', method.queues[0][kind].pointer)
