"""The frozen start that student and teacher have in common runs once.

A born-again student, or one that inherits a frozen backbone, has the same first modules as its teacher.  The teacher
runs first, so its result is lent to the student where all of this holds in that very step:

- the modules have the same path, class, options, weights and buffers bit for bit, and no hooks;
- the student's are frozen, and everything that differs between training and evaluation is in eval mode on both sides;
- the first takes the batch itself, the same tensor on both sides, and each of the others what the one before it gave;
- the student learns in the precision in which the teacher ran, and nothing has written over the result since.

The teacher runs these modules as the host does, whatever ``speed=`` says, so the student gets bit for bit what it would
have computed.  Where anything of this does not hold, the student runs its own modules as ever.
"""

from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from kd_mm.hosts.swap import swapped
from kd_mm.ops.live import counted, storage_key
from kd_mm.ops.modes import autocast_dtype
from kd_mm.teachers.flow import unhooked
from kd_mm.teachers.late import Late

#: Classes that do the same in training and in evaluation.
MODELESS = (nn.Conv2d, nn.ReLU, nn.MaxPool2d)
#: What a module has besides its options; the last two are of mmengine, and used before the training only.
_BESIDE = {*vars(nn.Module()), 'init_cfg', '_is_init'}


def similar(own: nn.Module, theirs: nn.Module) -> bool:
    """Whether two modules are of the same build: classes, options, and names and shapes of what they hold."""
    mine, other = _state(own), _state(theirs)
    return (_alike(list(own.modules()), list(theirs.modules()))
            and [(key, value.shape, value.dtype) for key, value in mine.items()] == [
                (key, value.shape, value.dtype) for key, value in other.items()])


def settled(own: nn.Module, theirs: nn.Module) -> bool:
    """Whether nothing but the weights decides what both give: frozen, in eval mode, without hooks, same classes and
    options."""
    mine, other = list(own.modules()), list(theirs.modules())
    return (_alike(mine, other) and not any(parameter.requires_grad for parameter in own.parameters()) and all(
        unhooked(one) and unhooked(two) and (type(one) in MODELESS or not one.training and not two.training)
        for one, two in zip(mine, other)))


def _alike(mine: List[nn.Module], other: List[nn.Module]) -> bool:
    """Whether modules are of the same classes with the same options, one by one."""
    return len(mine) == len(other) and all(
        type(one) is type(two) and _same(_options(one), _options(two)) for one, two in zip(mine, other))


def equal(own: nn.Module, theirs: nn.Module) -> bool:
    """Whether the weights and buffers of both are equal bit for bit."""
    mine, other = _state(own), _state(theirs)
    return list(mine) == list(other) and all(
        mine[key].device == other[key].device and torch.equal(mine[key], other[key]) for key in mine)


def _state(module: nn.Module) -> Dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _options(module: nn.Module) -> Dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _BESIDE}


def _same(one: Any, two: Any) -> bool:
    """Whether two options are equal for sure."""
    if isinstance(one, dict) and isinstance(two, dict):  # a config has a class of its own
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    if one is two or type(one) is not type(two) or isinstance(one, nn.Module):
        return one is two
    try:
        return bool((one == two).all()) if hasattr(one, 'all') else bool(one == two)
    except Exception:  # arrays of other shapes, or what cannot be compared
        return False


class Shared:
    """What a student and its teacher have in common at their start.

    Args:
        student, teacher: the models.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self.student, self.candidates = student, _candidates(student, teacher)
        #: (student's module, teacher's module), in the order in which they run.
        self.chain: List[Tuple[nn.Module, nn.Module]] = []
        self._used: List[Tuple[nn.Module, nn.Module]] = []
        self._compared: Any = None
        self._held: Optional[Tensor] = None
        self._facts: Any = None

    def start(self) -> bool:
        """Whether there is a common start in this step."""
        self._held, self._facts = None, None
        parts = [part for pair in self.chain for module in pair for part in _state(module).values()]
        state = [counted(part) for part in parts]
        if self._compared is None or self._compared[0] != state:
            count = next((number for number, pair in enumerate(self.chain) if not equal(*pair)), len(self.chain))
            # what was compared is held: neither tensor nor memory becomes another's of the same state
            self._compared = state, count, [(part, part.detach()) for part in parts]
        count = min(self._compared[1], next((
            number for number, pair in enumerate(self.chain) if not settled(*pair)), len(self.chain)))
        self._used = self.chain[:count] if any(_state(own) for own, _ in self.chain[:count]) else []
        return bool(self._used)

    @contextmanager
    def looking(self, images: Tensor) -> Iterator[None]:
        """Find in a pass of the teacher which of its modules take the images, and what such a module gave."""
        found: List[Tuple[nn.Module, nn.Module]] = []
        expected: Any = images

        def watched(own: nn.Module, theirs: nn.Module) -> Any:
            original = theirs.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal expected
                follows = len(args) == 1 and not kwargs and args[0] is expected
                output = original(*args, **kwargs)
                if follows and isinstance(output, Tensor):
                    expected = output
                    found.append((own, theirs))
                return output

            return forward

        with ExitStack() as stack:
            for own, theirs in self.candidates:
                stack.enter_context(swapped(theirs, 'forward', watched(own, theirs)))
            yield
        self.chain = found if len({id(own) for own, _ in found}) == len(found) else []

    @property
    def modules(self) -> Set[int]:
        """``id`` of every module of the teacher that runs as the host runs it."""
        return {id(module) for _, theirs in self._used for module in theirs.modules()}

    @property
    def held(self) -> Optional[int]:
        """The memory that nothing may write over."""
        return None if self._held is None else storage_key(self._held)

    @contextmanager
    def teaching(self, images: Tensor, given: Tensor) -> Iterator[None]:
        """The teacher's pass: its first modules run on ``images`` and their result is kept.

        Args:
            images: of the student.
            given: the same in the layout in which the teacher is given them.
        """
        chain = self._used
        expected: Any = given
        self._held = None

        def kept(number: int, module: nn.Module) -> Any:
            original = module.forward

            def forward(maps: Tensor) -> Tensor:
                nonlocal expected
                if maps is not expected:
                    expected = None
                    return original(maps)
                output = original(images if number == 0 else maps)
                if number + 1 == len(chain):
                    self._held = output
                    self._facts = images, output._version, autocast_dtype(images.device.type)
                    return output if given is images else output.contiguous(memory_format=torch.channels_last)
                expected = output
                return output

            return forward

        with ExitStack() as stack:
            for number, (_, theirs) in enumerate(chain):
                stack.enter_context(swapped(theirs, 'forward', kept(number, theirs)))
            yield

    @contextmanager
    def lent(self, tapped: Sequence[Any], recorded: Set[int]) -> Iterator[None]:
        """The student's pass: its first modules give what the teacher's gave.

        Args:
            tapped: the student's modules that are recorded.
            recorded: memory of what was recorded of the teacher; the student gets a copy of that.
        """
        held, self._held = self._held, None
        chain = self._used
        inner = {id(module) for own, _ in chain for module in own.modules()} - {id(own) for own, _ in chain[-1:]}
        if held is None or self._facts[0].requires_grad or any(id(owner) in inner for owner in tapped):
            yield
            return
        images, version, dtype = self._facts
        self._facts = None
        waiting: List[Any] = [images, held]
        copied = storage_key(held) in recorded
        del images, held

        def lending(number: int, module: nn.Module) -> Any:
            original = module.forward

            def forward(maps: Tensor) -> Tensor:
                expected, result = waiting
                if maps is not expected or result is None or result._version != version or (
                        autocast_dtype(result.device.type) != dtype):
                    waiting[:] = None, None
                    return original(maps)
                if number + 1 == len(chain):
                    waiting[:] = None, None
                    return result.clone() if copied else result
                waiting[0] = Late(
                    result.dtype, (), lambda: original(maps.value() if isinstance(maps, Late) else maps),
                    lambda other: None, RuntimeError(), result.device)
                return waiting[0]

            return forward

        with ExitStack() as stack:
            for number, (own, _) in enumerate(chain):
                stack.enter_context(swapped(own, 'forward', lending(number, own)))
            yield


def _candidates(own: nn.Module, theirs: nn.Module) -> List[Tuple[nn.Module, nn.Module]]:
    """The largest modules of the same path that are of the same build."""
    found, others = [], dict(theirs.named_children())
    for name, child in own.named_children():
        other = others.get(name)
        if other is None or name == 'data_preprocessor':
            continue
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict)) and similar(child, other) and not any(
                parameter.requires_grad for parameter in child.parameters()):
            found.append((child, other))
        else:
            found += _candidates(child, other)
    return found
