"""Instance-conditional distillation, the distillation term."""

import torch

from kd_mm.losses.icd import image_cells, position_embedding
from kd_mm.registry import build
from recipes.vector import Vector, recipe


@recipe('icd')
def icd(v: Vector) -> None:
    v.only('att_layers', 1)
    v.only('loss_form', 'mse')
    v.only('pos_on_v', False)
    v.only('use_pos_embedding', True)
    v.only('project_pos', True)
    v.only('distill_norm', 'ln (LayerNorm over head_dim, no affine, eps 1e-5)')
    v.ignore('instances for the auxiliary task; ins_mask_gt has those that count', 'ins_mask')
    hidden, positions, padding = v.number('hidden_dim'), v.series('pos_'), v.series('padding_')
    frame, shapes = v.tensor('batch_input_shape').tolist(), torch.stack(v.series('img_shape_')).double()
    for embedding, outside in zip(positions, padding):
        inside = image_cells(shapes, frame, tuple(outside.shape[2:]))
        assert torch.equal(inside, 1 - outside.double()), 'padding'
        ours = position_embedding(inside, hidden)
        assert torch.allclose(ours, embedding, atol=1e-5), 'position embedding (the file has it in float32)'

    # One matrix for query, key and value in the file, three here.
    for kind in ('weight', 'bias'):
        for index, name in enumerate(('query', 'key', 'value')):
            rows = v.tensor(f'param_in_proj_{kind}')[index * hidden:(index + 1) * hidden]
            v.arrays[f'param_{name}_{kind}'] = rows.numpy()

    loss = build(dict(type='ICDLoss', heads=v.number('att_heads'), tau=v.number('temp_value'),
                      distill=v.number('weight_value'), auxiliary=0.0))
    loss.given = dict(query=v.tensor('instance_query').transpose(0, 1), real=v.tensor('ins_mask_gt'),
                      positions=positions, padding=[part.bool() for part in padding])
    outcome = v.run(
        loss,
        rules=[(r'(query|key|value)_(\w+)', r'loss.layers.\1.\2'),
               (r'pos_projector_(\w+)', r'loss.layers.position.\1')])
    theirs, ours = (torch.cat([level.flatten(2) for level in side], dim=2).transpose(1, 2)
                    for side in (outcome.teacher, outcome.student))
    embedded = torch.cat([level.flatten(2) for level in positions], dim=2).transpose(1, 2)
    outside = torch.cat([level.flatten(1) for level in padding], dim=1).bool()
    v.check('decoded_mask', loss.attention_logits(loss.given['query'], theirs, embedded, outside))
    v.check('decoded_value', loss.split(loss.layers['value'](theirs)).permute(2, 0, 1, 3))
    loss(outcome.student, outcome.teacher, v.batch()).backward()
    for kind in ('weight', 'bias'):
        grads = [getattr(loss.layers[name], kind).grad for name in ('query', 'key', 'value')]
        v.check(f'gradnorm_param_in_proj_{kind}', torch.stack([
            torch.zeros(()).double() if grad is None else grad.norm() for grad in grads]).norm())
