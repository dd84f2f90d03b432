"""Parts of a teacher through ``torch.compile``: the largest modules in which nothing is tapped.

A tapped module may itself be such a part, since its own output is there; what lies around a tap runs as the host runs
it.
"""

import importlib
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Sequence, Set

import torch
from torch import nn

from kd_mm.hosts.swap import swapped
from kd_mm.hosts.taps import Tap
from kd_mm.teachers.flow import unhooked


def parts_around(model: nn.Module, taps: Sequence[Tap], alone: Sequence[nn.Module] = ()) -> List[nn.Module]:
    """The largest modules below ``model`` in which no tap lies, nor a module that must be one of them by itself.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 3, 1)))
        >>> [type(part).__name__ for part in parts_around(model, [Tap(model, '0.0')])]
        ['Conv2d', 'ReLU', 'Sequential']
    """
    tapped = {id(tap.owner) for tap in taps} | {id(module) for module in alone}
    methods = {id(tap.owner) for tap in taps if tap.name != 'forward'}  # called by the module's own forward
    found: List[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            inside = {id(other) for other in child.modules()} - {id(child)}
            runs = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
            if runs and not inside & tapped and id(child) not in methods:
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def room_for(parts: int) -> Any:
    """A context in which a function is compiled in as many forms as so many modules of its class need.

    torch counts them by function, not by module: after eight, the blocks of a deep network would run as they are.

    Args:
        parts: how many modules are compiled.
    """
    config: Any = importlib.import_module('torch._dynamo').config  # a second; only who compiles needs it
    limits = {}
    for names in (('recompile_limit', 'cache_size_limit'),  # the second is what torch 2.5 and older call it
                  ('accumulated_recompile_limit', 'accumulated_cache_size_limit')):
        name = next((name for name in names if hasattr(config, name)), None)
        if name is not None:
            limits[name] = getattr(config, name) * max(parts, 1)
    return config.patch(limits)


class Compiled:
    """The compiled forward of every part that has run.

    Args:
        model: the teacher's.
        backend: of ``torch.compile``.
    """

    def __init__(self, model: nn.Module, backend: str):
        self.model, self.backend = model, backend
        self._forwards: Dict[int, Any] = {}

    @contextmanager
    def on(self, taps: Sequence[Tap], alone: Sequence[nn.Module] = ()) -> Iterator[Set[int]]:
        """The parts run compiled inside; ``taps`` and ``alone``: see :func:`parts_around`.

        Yields:
            ``id`` of every module in a part; nothing else may be exchanged there.
        """
        inside: Set[int] = set()
        parts = parts_around(self.model, taps, alone)
        with ExitStack() as stack:
            stack.enter_context(room_for(len(parts)))
            for part in parts:
                if not unhooked(part):
                    continue
                if id(part) not in self._forwards:
                    self._forwards[id(part)] = torch.compile(part.forward, backend=self.backend)
                inside.update(id(module) for module in part.modules())
                stack.enter_context(swapped(part, 'forward', self._forwards[id(part)]))
            yield inside
