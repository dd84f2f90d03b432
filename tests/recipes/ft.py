"""Factor transfer."""

from typing import Any, Dict

from torch import nn

from recipes.vector import Vector, recipe


@recipe('ft')
def ft(v: Vector) -> None:
    common: Dict[str, Any] = dict(rules=[(r'translator_encoder_(\d)_(weight|bias)', r'loss.translators.0.\1.\2'),
                                         (r'paraphraser_encoder_(\d)_(weight|bias)', r'loss.paraphrasers.0.\1.\2')])
    loss = dict(type='FTLoss', loss_weight=v.number('loss_weight'), reconstruction_weight=0,
                factor_ratio=v.number('factor_channels') / v.tensor('teacher_0').shape[1],
                translator_norm=v.number('translator_bn'), paraphraser_norm=v.number('paraphraser_bn'))

    def leak(modules: nn.ModuleDict) -> None:
        for module in modules.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = v.number('leaky_slope')

    common['setup'] = leak
    outcome = v.run(dict(loss, p=1), **common)
    modules = outcome.modules['loss']
    v.check('factor_student_0', modules.translators[0](outcome.student[0]))
    v.check('factor_teacher_0', modules.paraphrasers[0](outcome.teacher[0]))
    v.run(dict(loss, p=2, loss_weight=1.0), prefix='variant_torchdistill_p2_', **common)
