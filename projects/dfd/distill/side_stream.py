"""The teacher's pass beside the student's forward, on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class SideStream:
    """A CUDA stream of its own for work that nothing needs before :meth:`join`.

    What is made within :meth:`work` may be read after ``join`` alone, and what it reads must live
    until then. Such tensors need no ``record_stream``: each ``work`` first waits for all that the
    main stream was given before it, so no memory that main still reads is taken again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Within the context, kernels are queued on this stream, behind those queued so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let what is queued from here on wait for the work."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
