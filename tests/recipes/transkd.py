"""Transformer distillation: features and patch embeddings."""

import torch
from torch import nn

from kd_mm.types.batch import KDBatch
from recipes.vector import Vector, recipe

EMBEDDINGS = {'transkd_base': 'linear', 'transkd_ea': 'assistant', 'transkd_glmixer': 'mixer'}


@recipe('transkd_*')
def transkd(v: Vector) -> None:
    features = [v.series('student_'), v.series('teacher_')]
    stages = len(features[0])
    for index, side in enumerate(('student', 'teacher')):
        for stage, tokens in enumerate(v.series(f'{side}_embed_')):
            size = features[index][stage].shape[2:]
            features[index].append(tokens.transpose(1, 2).reshape(len(tokens), -1, *size).contiguous())
    for name, side in (('in_channels', 0), ('out_channels', 1)):
        v.agree(name, [tensor.shape[1] for tensor in features[side][:stages]])
    v.only('embed', 5)  # all stages have patch embeddings
    v.agree('fuse_weights', [v.tensor(f'param_fuse_weights.{index}').item()
                             for index in range(len(v.series('param_fuse_weights.')))])
    for name in ('atten_weight', 'conv_weight'):
        if f'param_{name}' in v:
            v.agree(name, v.tensor(f'param_{name}').item())
    loss = dict(type='TransKDLoss', middle=v.number('mid_channel'), embedding=EMBEDDINGS[v.report.name],
                feature_weight=v.number('review_kd_loss_weight'), embed_weights=v.number('embed_weights'),
                heads=v.number('num_heads', default=4), add=v.number('add', default=True))
    batch = KDBatch(images=v.tensor('image') if 'image' in v else None)

    single = features[0][0].shape[0] == 1 and any('.fc1.' in name for name in v.arrays)
    squeeze, other = ('fc1', 'fc') if single else ('fc', 'fc1')
    v.ignore('the published code has one layer for one image and another for more', f'param_skfs.*.{other}.*')

    def one_based(modules: nn.ModuleDict) -> None:
        """Names in the file that count from 1, which no pattern can turn into ours."""
        method = modules['loss']
        for index in range(stages):
            method.linears[index].weight.data = v.tensor(f'param_embed{index + 1}_linearproject.weight')
            method.linears[index].bias.data = v.tensor(f'param_embed{index + 1}_linearproject.bias')
            if len(method.assistants):
                for ours, theirs in (('conv', 'proj'), ('norm', 'norm')):
                    part = getattr(method.assistants[index], ours)
                    part.weight.data = v.tensor(f'param_patch_embed{index + 1}.{theirs}.weight')
                    part.bias.data = v.tensor(f'param_patch_embed{index + 1}.{theirs}.bias')
        pairs = {r'skfs.{}.conv1.': 'enter', r'skfs.{}.conv2.': 'leave', 'skfs.{}.' + squeeze + '.': 'squeeze',
                 r'skfs.{}.fcs.': 'select'}
        state = {f'fusions.{index}.{ours}.{name[len(theirs.format(index)) + 6:]}': name
                 for index in range(stages) for theirs, ours in pairs.items()
                 for name in v.arrays if name.startswith('param_' + theirs.format(index))}
        state.update({f'shares.{index}': f'param_fuse_weights.{index}' for index in range(len(method.shares))})
        if method.mixer is not None:
            state.update({'mixer.attention_weight': 'param_atten_weight', 'mixer.conv_weight': 'param_conv_weight',
                          'mixer.qkv.weight': 'param_attn4.qkv.weight', 'mixer.proj.weight': 'param_attn4.proj.weight',
                          'mixer.proj.bias': 'param_attn4.proj.bias'})
            state.update({f'mixer.{ours}.{kind}': f'param_{theirs}.{kind}' for kind in ('weight', 'bias')
                          for ours, theirs in (('value', 'conv1'), ('gate', 'conv2'))})
        parameters = dict(method.named_parameters())
        used = {name for name in v.arrays if name.startswith('param_') and name not in v.report.skipped}
        for ours, theirs in state.items():
            assert parameters[ours].shape == v.arrays[theirs].shape, (ours, theirs)
            parameters[ours].data = v.tensor(theirs)
            used.remove(theirs)
        assert all('embed' in name for name in used), f'parameters of the file that were not set: {sorted(used)}'

    student, teacher = features
    outcome = v.run(loss, student=student, teacher=teacher, batch=batch, setup=one_based,
                    grads=[f'grad_student_{index}' for index in range(stages)] + ['-'] * stages)
    for index, grad in enumerate(outcome.grads[stages:]):
        v.check(f'grad_student_embed_{index}', grad.flatten(2).transpose(1, 2))
    method = outcome.modules['loss']
    leaves = tuple(outcome.student)
    terms = method.terms(leaves, tuple(teacher), batch, [None] * len(leaves))
    v.check('loss_hcl', torch.stack(terms['feature']).sum())
    v.check('loss_embed', torch.stack(terms['embedding']))
    for index, tensor in enumerate(method.fused(leaves[:stages])):
        v.check(f'fused_{index}', tensor)
    for index, tensor in enumerate(method.embedded(leaves[stages:], leaves[:stages], batch)):
        v.check(f'embed_out_{index}', tensor)
