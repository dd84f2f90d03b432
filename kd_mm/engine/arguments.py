"""Which arguments of the hook are wrong, before anything is built: training and ``kd-mm check`` say the same."""

from typing import Any, Callable, Collection, Dict, Mapping

from kd_mm.engine.branches import check_branches
from kd_mm.engine.trial import wish
from kd_mm.hosts.growing import WAYS
from kd_mm.ops.checks import boolean, from_zero, whole
from kd_mm.teachers.speed import AUTO, EXACT


def argument_faults(arguments: Mapping[str, Any]) -> Dict[str, str]:
    """What is wrong with the arguments of the hook (``kd_mm.DistillHook``) that only it looks at: name -> sentence."""
    owner = 'kd_mm.DistillHook'
    faults: Dict[str, str] = {}

    def check(name: str, call: Callable[[str, str, Any], Any]) -> None:
        try:
            if name in arguments:
                call(owner, name, arguments[name])
        except ValueError as error:
            faults[name] = str(error)

    check('teacher_strict', boolean)
    check('shard_teacher', lambda owner, name, value: _exact_shards(owner, name, value, arguments))
    check('adapter_lr_mult', from_zero)
    check('adapter_decay_mult', from_zero)
    check('seed', lambda owner, name, value: whole(owner, name, value, None))
    check('score_teacher', wish)
    check('agreement', lambda owner, name, value: whole(owner, name, value, 0))
    check('inherit', _module_paths)
    check('teachers', _strict_of_each)
    check('branches', lambda owner, name, value: value is None or check_branches(owner, name, value))
    return faults


def _exact_shards(owner: str, name: str, value: Any, arguments: Mapping[str, Any]) -> None:
    if not boolean(owner, name, value):
        return
    others = arguments.get('teachers')
    entries = [arguments, *(others.values() if isinstance(others, Mapping) else ())]
    for speed in (entry.get('speed', AUTO) for entry in entries if isinstance(entry, Mapping)):
        if speed not in (AUTO, EXACT):
            raise ValueError(f'{owner}: {name}=True: a sharded teacher runs in its exact form, and speed={speed!r} '
                             'asks for another; leave one of them out')


def _module_paths(owner: str, name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for path, way in value.items():
            if not isinstance(path, str) or way not in WAYS:
                raise ValueError(f"{owner}: {name}={value!r} must say for each module path how: "
                                 f"{', '.join(map(repr, WAYS))}, such as dict(neck='copy', bbox_head='grow')")
    elif not isinstance(value, str) and not (
            isinstance(value, Collection) and all(isinstance(path, str) for path in value)):
        raise ValueError(f"{owner}: {name}={value!r} must be a list of module paths, such as ('neck', 'bbox_head'), or "
                         "dict(bbox_head='grow')")


def _strict_of_each(owner: str, name: str, value: Any) -> None:
    for key, entry in value.items() if hasattr(value, 'items') else ():
        if hasattr(entry, 'get') and 'teacher_strict' in entry:
            boolean(owner, f'{name}[{key!r}].teacher_strict', entry['teacher_strict'])
