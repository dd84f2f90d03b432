"""Streams of a device that is not there, and a look-out for what two of them do to the same memory in no order."""

import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    """A clock for each stream: what of the others is known to be done."""

    def __init__(self, api, name):
        self.api, self.name = api, name
        self.clock = {self: 0}

    def wait_stream(self, other):
        self.api.log.append(f'{self.name} waits for {other.name}')
        self.wait_event(dict(other.clock))

    def wait_event(self, event):
        for stream, time in event.items():
            self.clock[stream] = max(self.clock.get(stream, 0), time)

    def record_event(self):
        self.api.log.append(f'event on {self.name}')
        return dict(self.clock)


class Streams(TorchDispatchMode):
    """Stands for ``torch.cuda``, and watches every operation: what another stream has made must be known to be done.

    Memory that is freed while a stream it was not asked for by may still use it must have been recorded for that.
    """

    def __init__(self):
        super().__init__()
        self.log, self.races, self.recorded = [], [], set()
        self.main = self.now = Stream(self, 'main')
        self.made = {}

    def Stream(self, device):  # noqa: N802
        return Stream(self, 'side')

    def current_stream(self, device):
        return self.now

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def record(self, tensor, stream):
        self.recorded.add((tensor.untyped_storage()._cdata, stream.name))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.now.clock[self.now] += 1
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                key = leaf.untyped_storage()._cdata
                maker, time, _ = self.made.get(key, (self.now, 0, None))
                if self.now.clock.get(maker, 0) < time:
                    self.races.append(f'{func} on {self.now.name} reads what {maker.name} has not finished')
                if maker is not self.now:
                    self.made[key][2].add(self.now.name)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.made:
                    users = set()
                    self.made[storage._cdata] = (self.now, self.now.clock[self.now], users)
                    weakref.finalize(storage, self._freed, storage._cdata, users)
        return output

    def _freed(self, key, users):
        self.made.pop(key, None)
        missing = users - {name for kept, name in self.recorded if kept == key}
        if missing:
            self.races.append(f'memory freed that {missing} may still use')
