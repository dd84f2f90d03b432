"""Holistic distillation: the adversarial terms, and discriminators with both objectives."""

import re
from typing import Any, Dict

import torch
from torch import Tensor

from kd_mm.losses.skd_holistic import SKDHolisticLoss, discriminator_loss, generator_loss
from kd_mm.registry import build
from kd_mm.types.batch import KDBatch
from recipes.vector import Vector, recipe

NAMES = (
    (r'preprocess_additional\.(weight|bias)', r'norm.\1'),
    (r'last\.0\.(weight|bias)', r'score.\1'),
    (r'attn(\d)\.(query|key|value)_conv\.(weight|bias)', lambda m: f'attentions.{int(m[1]) - 1}.{m[2]}.{m[3]}'),
    (r'attn(\d)\.gamma', lambda m: f'attentions.{int(m[1]) - 1}.gamma'),
    (r'l(\d)\.0\.module\.weight_u', lambda m: f'convs.{int(m[1]) - 1}.u'),
    (r'l(\d)\.0\.module\.bias', lambda m: f'convs.{int(m[1]) - 1}.conv.bias'),
    (r'l(\d)\.0\.module\.weight_bar', lambda m: f'convs.{int(m[1]) - 1}.conv.weight'))


def ours(name: str) -> str:
    """Our name of one of the file's parameters."""
    for pattern, replacement in NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(name)


def single(value: Tensor) -> Tensor:
    """Rounded as the file rounds its gradients to save space."""
    return value.float()


@recipe('skd_adv_terms')
def terms(v: Vector) -> None:
    for kind, objective in (('wgan_gp', 'wgan-gp'), ('hinge', 'hinge')):
        student, teacher = (v.tensor(f'd_out_{side}').requires_grad_() for side in ('student', 'teacher'))
        present = torch.ones(len(student)).double()
        generator = generator_loss(student, present)
        discriminator = discriminator_loss(objective, student, teacher, present)
        v.check(f'loss_g_{kind}', generator)
        v.check(f'loss_d_{kind}', discriminator)
        v.check(f'grad_g_student_{kind}', torch.autograd.grad(generator, student)[0])
        grads = torch.autograd.grad(discriminator, [student, teacher])
        v.check(f'grad_d_student_{kind}', grads[0])
        v.check(f'grad_d_teacher_{kind}', grads[1])
        if kind == 'hinge':
            v.check('loss', discriminator)


@recipe('skd_holistic_*')
def holistic(v: Vector) -> None:
    objective = v.number('adv_loss_type')
    v.only('preprocess_GAN_mode', 1)  # batch norm
    options: Dict[str, Any] = dict(
        type='SKDHolisticLoss', objective=objective, condition_on_image=False, mask_ignored=False,
        width=v.number('conv_dim'), discriminator_weight=v.number('lambda_d'), loss_weight=v.number('lambda_adv'),
        optimizer=dict(type='SGD', lr=0.1))
    v.ignore('there is no gradient penalty', *(() if objective == 'wgan-gp' else ('lambda_gp', )))
    if objective == 'wgan-gp':
        options['penalty_weight'] = v.number('lambda_gp')
    loss: Any = build(options)
    assert isinstance(loss, SKDHolisticLoss)
    student, teacher = v.tensor('student_0').requires_grad_(), v.tensor('teacher_0')
    assert student.shape[1] == v.number('input_channel')
    loss.prepare((student, ), (teacher, ))
    opponent = loss.opponents()[0]
    network: Any = opponent.network
    given = [name[len('param_'):] for name in v.arrays if name.startswith('param_')]
    state = {ours(name): v.tensor(f'param_{name}') for name in given}
    network.load_state_dict(state, strict=True)
    if 'alpha' in v:
        loss.fixed_draws = v.tensor('alpha')

    value = loss(student, teacher, KDBatch())
    v.check('loss', value)
    v.check('grad_student_0', single(torch.autograd.grad(value, student)[0]))
    v.check('d_out_g', opponent(student))

    # The published power iteration moves on in the student's forward as well; ours only in the discriminator's step.
    move_on(network, student)
    scores = []
    network.register_forward_hook(lambda module, inputs, output: scores.append(output))
    grads: Dict[str, Tensor] = {}
    opponent.optimizer.register_step_pre_hook(lambda *_: grads.update(
        (name, parameter.grad.clone()) for name, parameter in network.named_parameters()))
    total: Any = opponent.learn()
    v.check('loss_d', total)
    v.check('d_out_student', scores[0])
    v.check('d_out_teacher', scores[1])
    present = torch.ones(len(student)).double()
    adversarial = discriminator_loss(objective, scores[0], scores[1], present)
    v.check('loss_d_adv', adversarial)
    v.check('loss_d_gp', total / loss.discriminator_weight - adversarial)

    for name, gradient in grads.items():
        theirs = next(other for other in given if ours(other) == name)
        consistent = f'ext_grad_d_param_{theirs}'
        v.check(consistent if consistent in v else f'grad_d_param_{theirs}', single(gradient))
    v.skip('grad_d_param_l*.weight_bar', 'the published backward pass takes the singular vectors of the last forward '
           'for all of them; the consistent gradient is compared as ext_grad_d_param_*')
    for name, buffer in network.named_buffers():
        v.check(f'after_{next(other for other in given if ours(other) == name)}', buffer)


def move_on(network: Any, student: Tensor) -> None:
    """One more power iteration in every convolution with spectral norm."""
    network.requires_grad_(True)
    with torch.no_grad():
        network(student)
    network.requires_grad_(False)
