"""The branches of a semi-supervised detector, in which its inner student is distilled.

The host never calls that student as a whole: it is handed a batch in ``loss_by_gt_instances`` (labelled images) and
another in ``loss_by_pseudo_instances`` (unlabelled ones, whose labels its own mean teacher has made).  Each of them is
a step of its own here: the teachers read that batch, the student's taps record while the host computes its losses, and
what comes out is named after the branch, as the host names its own.
"""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import nn

from kd_mm.engine.preflight import taken
from kd_mm.engine.readers.maps import MapReader
from kd_mm.hosts.semi import BRANCHES, is_semi, own_losses, preprocessor_of
from kd_mm.hosts.swap import Swap
from kd_mm.losses.base.loss import opponents_of
from kd_mm.teachers.preprocess import Normalisation

LABELLED = 'sup'
NO_BRANCHES = ('kd_mm.DistillHook: branches= is for semi-supervised detectors of mmdet (SoftTeacher and its kin). '
               'Leave it out')


def check_branches(owner: str, name: str, value: Any) -> Tuple[str, ...]:
    """``value`` as names of branches.

    Raises:
        ValueError: it is none, or no list of some.

    Example:
        >>> check_branches('kd_mm.DistillHook', 'branches', 'sup')
        ('sup',)
    """
    found = (value, ) if isinstance(value, str) else value
    if not isinstance(found, (tuple, list)) or not found or any(part not in BRANCHES for part in found):
        raise ValueError(f'{owner}: {name}={value!r} must be one of {", ".join(map(repr, BRANCHES))}, or a list of '
                         'them')
    return tuple(dict.fromkeys(found))


class Branches:
    """Where a distiller takes part in a semi-supervised training.

    Args:
        model: the semi-supervised detector.
        names: of the branches, see :data:`kd_mm.hosts.semi.BRANCHES`. Default all.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] = tuple(BRANCHES)):
        self.model, self.names = model, tuple(names)

    def faults(self, distiller: Any) -> List[str]:
        """What a distiller of the inner student cannot do here, as sentences."""
        model: Any = self.model
        found: List[str] = []
        if Normalisation(preprocessor_of(model)) != Normalisation(getattr(model.student, 'data_preprocessor', None)):
            found.append(f'{type(model).__name__}: the detector inside has another data_preprocessor (mean, std, order '
                         'of the colours, padding) than the branches, whose batches it gets. Give both the same: '
                         'detector.data_preprocessor = model.data_preprocessor.data_preprocessor')
        if distiller.peers:
            found.append(f'{type(model).__name__}: a peer would need pseudo labels of its own. Use a fixed teacher or '
                         'an EMATeacher')
        own = own_losses(model)
        for term in distiller.all_terms():
            kind = type(term.loss).__name__
            if 'unsup' in self.names and own is not None and not isinstance(term.reader, MapReader):
                found.append(f'{term.name}: {kind} looks at what the student has assigned or sampled, and {own} '
                             'computes the losses of unlabelled images from parts of it. Use '
                             "branches='sup', or a loss on maps")
            if len(self.names) > 1 and opponents_of(term.loss):
                found.append(f'{term.name}: {kind} trains a network against the student once a step, and there are two '
                             "batches. Use branches='sup' or 'unsup'")
            if len(self.names) > 1 and term.loss.weight.auto is not None:
                found.append(f"{term.name}: loss_weight='auto' measures one batch in a step, and there are two. Use "
                             "branches='sup' or 'unsup', or give a number")
        if distiller.labelling and LABELLED not in self.names:
            found.append("labels are added to labelled images: branches must have 'sup'")
        return found

    def attach(self, distiller: Any) -> List[Any]:
        """Put two hooks on the model, which exchange the methods of its branches while it computes its losses."""
        swaps: List[Swap] = []
        model: Any = self.model
        names = self.names
        if any(getattr(hook, '_kd_mm', False) for hook in model._forward_hooks.values()):
            raise RuntimeError('a distiller is already attached to this student')

        @torch.compiler.disable
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module is model and module.training and _mode(args, kwargs) == 'loss':
                off()
                for name in names:
                    method = getattr(model, BRANCHES[name])
                    swaps.append(Swap(model, BRANCHES[name], _branch(distiller, name, method)).on())

        @torch.compiler.disable
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if module is model:
                off()

        def off() -> None:
            while swaps:
                swaps.pop().off()

        before._kd_mm = after._kd_mm = True  # type: ignore[attr-defined]
        return [model.register_forward_pre_hook(before, with_kwargs=True),
                model.register_forward_hook(after, with_kwargs=True, always_call=True)]


def branch_faults(model: nn.Module, distiller: Any, names: Any) -> List[str]:
    """What cannot be distilled in a model as ``branches=`` says, as sentences.

    Args:
        model: any; a semi-supervised detector or not.
        distiller: of its student.
        names: what ``branches=`` says; None for the default.
    """
    if not is_semi(model):
        return [] if names is None else [NO_BRANCHES]
    return Branches(model, tuple(BRANCHES) if names is None else check_branches(
        'kd_mm.DistillHook', 'branches', names)).faults(distiller)


def _mode(args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    return kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')


def _branch(distiller: Any, name: str, method: Any) -> Any:
    """The method of a branch as a step of the distiller."""
    def branch(inputs: Any, samples: Any, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        try:
            samples = distiller.begin(inputs, samples, label=name == LABELLED)
            losses = method(inputs, samples, *args, **kwargs)
            with distiller.logged(f'{name}_'):
                found = distiller.end(losses)
        except BaseException:
            distiller.clear()
            raise
        new = {key: value for key, value in found.items() if key not in losses}
        clash = next((key for key in new if f'{name}_{key}' in losses), None)
        if clash is not None:
            raise ValueError(taken(f'{name}_{clash}'))
        result = {key: found[key] for key in losses}
        result.update({f'{name}_{key}': value for key, value in new.items()})
        return result
    return branch
