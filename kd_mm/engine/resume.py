"""What a resume needs besides the host's own state: adapters, teachers that change, opponents.

It lies under one key of the checkpoint::

    state_dict   adapters and generators, and the networks of opponents
    teachers     name -> state, of every teacher that changes; empty where an ``EMAHook`` holds the average
    opponents    <loss>/<number> -> state of the optimizer
    weights      <loss> -> what was measured for a weight of ``'auto'``
    speed        name -> what was decided about the form of each teacher; not in files of earlier versions
    scores       what the teachers scored before the first step, and on which images; see ``score_teacher``

What is saved and what the config needs must agree by name and shape in all four: a part that is silently left as it
was built is a random one.
"""

from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import Tensor

from kd_mm.engine.distiller import Distiller
from kd_mm.losses.base.loss import opponents_of
from kd_mm.losses.base.opponent import Opponent
from kd_mm.ops.problems import Problems
from kd_mm.teachers.base import Teacher
from kd_mm.teachers.ema import EMATeacher
from kd_mm.teachers.peer import PeerTeacher

#: Key of a checkpoint under which all of this lies.
SIDE_KEY = 'kd_mm'


def side_state(distiller: Distiller) -> Dict[str, Any]:
    """What :func:`restore` needs, on the CPU."""
    side: Dict[str, Any] = dict(state_dict=_on_cpu(distiller.trainable_modules().state_dict()))
    teachers = {name: _on_cpu(teacher.state()) for name, teacher in distiller.teachers.items() if _changes(teacher)}
    opponents = {name: _on_cpu(opponent.state()) for name, opponent in _opponents(distiller).items()}
    if teachers:
        side['teachers'] = teachers
    if opponents:
        side['opponents'] = opponents
    weights = distiller.balance.state()
    if weights:
        side['weights'] = weights
    speed = {name: teacher.fast.state() for name, teacher in distiller.teachers.items() if teacher.fast.checked}
    if speed:
        side['speed'] = speed
    return side


def restore(distiller: Distiller, side: Optional[Mapping[str, Any]], average: Optional[Mapping[str, Tensor]]) -> None:
    """Put back what :func:`side_state` saved, all of it or nothing.

    Args:
        side: what the checkpoint has under :data:`SIDE_KEY`.
        average: the running average of the student that an ``EMAHook`` has left in the checkpoint, if it did.

    Raises:
        ValueError: the checkpoint and the config do not agree; the names that differ, and the mend.
    """
    side = side or {}
    modules = distiller.trainable_modules()
    adapters = side.get('state_dict', {})
    teachers = _teacher_states(distiller, side, average)
    opponents = _opponent_states(distiller, side)
    weights = side.get('weights', {})
    faults = [f"this config's {part} under {SIDE_KEY!r} ({fault})" for part, fault in (
        ('adapters', _difference(adapters, modules.state_dict())),
        ('teachers', _teacher_fault(distiller, teachers)),
        ('opponents', _opponent_fault(distiller, opponents)),
        ('measured weights', '; '.join(distiller.balance.fault(weights, distiller.current.terms)))) if fault]
    if faults:
        problems = Problems()
        problems.add(f'the checkpoint to resume from does not have {", nor ".join(faults)}. Resume with the config it '
                     'was written by, or start from its weights with load_from')
        problems.raise_any()
    modules.load_state_dict(adapters)
    for name, state in teachers.items():
        distiller.teachers[name].load(state)
    for name, opponent in _opponents(distiller).items():
        opponent.load(opponents[name])
    distiller.balance.load(weights)
    for name, state in side.get('speed', {}).items():
        if name in distiller.teachers:
            distiller.teachers[name].fast.load(state)


def _changes(teacher: Teacher) -> bool:
    """Whether a teacher has a state; a fixed one inherits a ``load`` that does nothing."""
    return type(teacher).load is not Teacher.load


def _teacher_states(distiller: Distiller, side: Mapping[str, Any], average: Optional[Mapping[str, Tensor]]
                    ) -> Dict[str, Any]:
    """The state of each teacher by name, an average of the student's from wherever it is."""
    states = dict(side.get('teachers', {}))
    for name, teacher in distiller.teachers.items():
        # Empty: the average was the EMAHook's. Not there at all: the same, saved by an earlier version.
        if isinstance(teacher, EMATeacher) and not states.get(name):
            states.pop(name, None)
            if average is not None:
                states[name] = dict(average)
    return states


def _teacher_fault(distiller: Distiller, states: Mapping[str, Any]) -> str:
    needed = [name for name, teacher in distiller.teachers.items() if _changes(teacher)]
    faults = _names('missing', [name for name in needed if name not in states])
    faults += _names('left over', [name for name in states if name not in needed])
    for name in needed:
        teacher, state = distiller.teachers[name], states.get(name, {})
        parts: List[Any] = []
        if isinstance(teacher, PeerTeacher):
            parts = [(state.get('model', {}), teacher.model), (state.get('terms', {}), teacher.terms)]
        elif isinstance(teacher, EMATeacher):
            parts = [(state, teacher.model)]
        if name in states:
            faults += [f'{name}: {fault}' for saved, part in parts
                       for fault in [_difference(saved, part.state_dict())] if fault]
    return '; '.join(faults)


def _opponents(distiller: Distiller) -> Dict[str, Opponent]:
    return {f'{term.name}/{index}': opponent for term in distiller.all_terms()
            for index, opponent in enumerate(opponents_of(term.loss))}


def _opponent_states(distiller: Distiller, side: Mapping[str, Any]) -> Dict[str, Any]:
    """The state of each opponent's optimizer by name."""
    found = side.get('opponents', {})
    if hasattr(found, 'keys'):
        return dict(found)
    # Earlier versions wrote a list, in the order of the losses of then: that of their adapters.
    losses = list(dict.fromkeys(key.split('.')[0] for key in side.get('state_dict', {})))
    names = sorted(_opponents(distiller), key=lambda name: losses.index(name.split('/')[0])
                   if name.split('/')[0] in losses else len(losses))
    states = dict(zip(names, found))
    states.update({str(index): found[index] for index in range(len(names), len(found))})
    return states


def _opponent_fault(distiller: Distiller, states: Mapping[str, Any]) -> str:
    opponents = _opponents(distiller)
    faults = _names('missing', [name for name in opponents if name not in states])
    faults += _names('left over', [name for name in states if name not in opponents])
    # The state of another optimizer loads without a word and fails, or does nonsense, in the first step.
    for name, opponent in opponents.items():
        if name in states and _options(opponent.state()) != _options(states[name]):
            faults.append(f'{name}: the state of another optimizer than {type(opponent.optimizer).__name__}')
    return '; '.join(faults)


def _options(state: Mapping[str, Any]) -> List[Any]:
    return [(set(group), len(group['params'])) for group in state.get('param_groups', ())]


def _difference(saved: Mapping[str, Any], needed: Mapping[str, Any]) -> str:
    """In which names and shapes two state dicts differ; empty if in none."""
    faults = _names('missing', [key for key in needed if key not in saved])
    faults += _names('left over', [key for key in saved if key not in needed])
    faults += _names('of another shape', [
        key for key in needed if key in saved and getattr(saved[key], 'shape', None) != needed[key].shape])
    return '; '.join(faults)


def _names(fault: str, names: List[str]) -> List[str]:
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return [f'{fault}: {", ".join(map(str, names[:3]))}{more}'] if names else []


def _on_cpu(state: Any) -> Any:
    """A nested state without anything that changes later."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state
