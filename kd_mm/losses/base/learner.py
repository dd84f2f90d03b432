"""What some methods learn from the teacher alone before they distil: the protocol, and the file that keeps it.

A loss that needs it names the constructor argument that takes the file (``learned``) and builds a :class:`Learner`
(``learner()``).  ``tools/learn_tokens.py`` trains the learners of a config and writes their files; see
:mod:`kd_mm.lab.learning`.
"""

import os
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from kd_mm.types.batch import Features

RANDOM = 'random'


class Learner(nn.Module):
    """Trainable parts that are fitted to the features of a frozen teacher; its ``state_dict`` is what is saved.

    Class attributes:
        task_loss: the teacher goes on with the features that :meth:`forward` gives, and its own losses on labelled
            data are part of the objective.  Without it the teacher stops at the tap.
        lr, weight_decay, iters: of Adam, with the rate falling along a cosine to (almost) zero.
    """

    task_loss = True
    lr = 0.01
    weight_decay = 0.0
    iters = 2000

    def prepare(self, teacher: Features) -> None:
        """Create the parameters, sized by the teacher's features; a second call changes nothing."""
        raise NotImplementedError

    def forward(self, level: int, teacher: Tensor) -> Tuple[Tensor, Tensor]:
        """What the teacher goes on with instead of its feature (N, C, H, W), and a loss of its own: a scalar."""
        raise NotImplementedError


def read_learned(owner: str, argument: str, value: Any) -> Optional[Dict[str, Tensor]]:
    """The state dict behind a ``learned`` argument; None for ``'random'``.

    Args:
        owner: class name of the loss, for messages.
        argument: name of the argument.
        value: path of a file of ``tools/learn_tokens.py``, a state dict, or ``'random'`` (tests).

    Raises:
        ValueError: nothing is given, there is no such file, or it was written for another loss.

    Example:
        >>> read_learned('MasKDLoss', 'tokens', {'a': torch.zeros(1)})
        {'a': tensor([0.])}
    """
    command = 'python tools/learn_tokens.py CONFIG'
    if value is None:
        raise ValueError(f"{owner}: {argument}=None; it needs what was learned from the teacher beforehand. Give "
                         f"{argument}='work_dirs/learned/NAME.pth' and let `{command}` write that file "
                         f"({argument}='random' to test)")
    if isinstance(value, str) and value == RANDOM:
        return None
    if isinstance(value, Mapping):
        return dict(value)
    path = os.path.expanduser(str(value))
    if not os.path.isfile(path):
        raise ValueError(f'{owner}: {argument}={value!r} does not exist (looked at {os.path.abspath(path)}). Learn it '
                         f'from the teacher first: {command}')
    content = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(content, dict) or content.get('loss') != owner or 'state_dict' not in content:
        found = content.get('loss') if isinstance(content, dict) else None
        raise ValueError(f'{owner}: {argument}={value!r} was not written for it (but for {found}). Learn it from the '
                         f'teacher: {command}')
    return content['state_dict']


def load_learned(owner: str, argument: str, module: nn.Module, state: Optional[Dict[str, Tensor]]) -> None:
    """Load ``state`` into ``module`` and freeze it; with None its random values stay.

    Raises:
        ValueError: the keys or shapes are not those of the module.
    """
    if state is not None:
        own = module.state_dict()
        wrong = [key for key in {**own, **state} if key not in own or key not in state
                 or own[key].shape != state[key].shape]
        if wrong:
            shapes = [tuple(part[wrong[0]].shape) if wrong[0] in part else 'missing' for part in (state, own)]
            raise ValueError(f'{owner}: what {argument} gives does not fit the teacher at this tap ({len(wrong)} of '
                             f'{len(own)} entries; {wrong[0]}: given {shapes[0]}, needed {shapes[1]}). It was learned '
                             'from another teacher, tap or number of tokens')
        module.load_state_dict(state)
    module.requires_grad_(False)
