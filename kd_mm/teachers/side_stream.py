"""A teacher on a stream of its own, beside the student's forward (CUDA).

The teacher is launched before the student as always; its kernels run on another stream, and the student's stream waits
for them where the taps are read.  The order is kept by events on the device: the host waits for nothing.

What it costs: both forwards are alive at once, and the allocator keeps a pool for each stream.
"""

from contextlib import contextmanager
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor


class SideStream:
    """One stream beside the current one of a device.

    Args:
        device: where everything is.
        streams: ``torch.cuda``, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, streams: Any = torch.cuda):
        self.device, self.streams = device, streams
        self._stream: Any = None
        self._done: Any = None

    @contextmanager
    def running(self, given: Iterable[Tensor]) -> Iterator[None]:
        """What is launched inside runs on the side, after all that was launched so far.

        Args:
            given: what it reads, made by the current stream: their memory may not be used again before it has.
        """
        if self._stream is None:
            self._stream = self.streams.Stream(self.device)
        self._stream.wait_stream(self.streams.current_stream(self.device))
        with self.streams.stream(self._stream):
            yield
        for tensor in given:
            self.record(tensor, self._stream)
        self._done = self._stream.record_event()

    def join(self, results: Iterable[Tensor]) -> None:
        """Let the current stream wait for what was launched, before it reads the results; once more does nothing."""
        if self._done is None:
            return
        current = self.streams.current_stream(self.device)
        current.wait_event(self._done)
        self._done = None
        for tensor in results:
            self.record(tensor, current)

    @staticmethod
    def record(tensor: Tensor, stream: Any) -> None:
        """Tell the allocator that a stream uses memory that another one has asked for."""
        tensor.record_stream(stream)
