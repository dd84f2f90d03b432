"""One attribute of one instance, exchanged for a while and then put back exactly as it was."""

from contextlib import contextmanager
from typing import Any, Iterator

_ABSENT: Any = object()


class Swap:
    """Gives an instance another attribute until :meth:`off`, for what begins and ends in different calls.

    It writes into the instance's own dict, past ``nn.Module.__setattr__``: a method is replaced on this instance alone
    and a module given as the value does not become a sub-module.  What is put back is what was in that dict: the
    attribute, ``None`` included, or nothing, so that the class's own shows again.

    Several swaps of the same attribute are undone in reverse order.

    Args:
        owner: the instance.
        name: of the attribute; it need not exist.
        value: what it is meanwhile.

    Example:
        >>> class Host:
        ...     def loss(self):
        ...         return 1
        >>> host = Host()
        >>> swap = Swap(host, 'loss', lambda: 2).on()
        >>> host.loss()
        2
        >>> swap.off()
        >>> host.loss(), vars(host)
        (1, {})
    """

    def __init__(self, owner: Any, name: str, value: Any):
        self.owner, self.name, self.value = owner, name, value
        self.active = False
        self._before: Any = _ABSENT

    def on(self) -> 'Swap':
        """Exchange the attribute; once more does nothing."""
        if not self.active:
            self._before = vars(self.owner).get(self.name, _ABSENT)
            vars(self.owner)[self.name] = self.value
            self.active = True
        return self

    def off(self) -> None:
        """Put back what was there; once more does nothing."""
        if not self.active:
            return
        self.active = False
        if self._before is _ABSENT:
            vars(self.owner).pop(self.name, None)
        else:
            vars(self.owner)[self.name] = self._before
        self._before = _ABSENT


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """A :class:`Swap` that is undone at the end of the block, whatever happens in it."""
    swap = Swap(owner, name, value).on()
    try:
        yield
    finally:
        swap.off()
