"""Pair-wise part of SKD."""

from recipes.vector import Vector, identical_loss, recipe


@recipe('skd_pairwise_cirkd')
def skd_pairwise_cirkd(v: Vector) -> None:
    loss = dict(type='SKDPairwiseLoss', kernel=v.number('pool_kernel'), loss_weight=v.number('loss_weight'))
    v.run(loss)
    v.check('loss_identical', identical_loss(v, loss))


@recipe('skd_pairwise_official')
def skd_pairwise_official(v: Vector) -> None:
    # 1e-8 is in the conventions of the file, not among its hyper-parameters.
    loss = dict(type='SKDPairwiseLoss', scale=v.number('pool_scale'), detach_norm=True, eps=1e-8,
                loss_weight=v.number('loss_weight'))
    v.run(loss)
    v.check('loss_identical', identical_loss(v, loss))
    v.check('ext_grad_student_0_attached', v.run(dict(loss, detach_norm=False), grads=[]).grads[0])
