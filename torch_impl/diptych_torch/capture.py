"""A decode step as a program that is recorded once and replayed: on CUDA a graph, without Python and launches between
its kernels.

A step can be recorded if it works on tensors that stay where they are and never asks the device for a value.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[], None]
Capture = Callable[[Step], Step]  # records a step; calling what it returns does the step again


class CannotCapture(Exception):
    """This step waits for the device; the message says where."""


class CudaGraphs:
    """Records steps as CUDA graphs. All share one pool of memory: a step leaves its results in tensors of the caller's,
    so nothing in the pool outlives a replay, and replays follow each other on one stream.

    A step is done twice before it is recorded (libraries make their workspaces, kernels are chosen): the caller sees to
    it that this changes nothing.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Raises CannotCapture for a step that waits for the device."""
        with torch.cuda.device(self._device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step()
                _refuse_waits(step)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                step()

        def replay(kept: Step = step) -> None:  # what the step reads and writes must outlive the graph
            graph.replay()

        return replay


def _refuse_waits(step: Step) -> None:
    """Do the step; CannotCapture where it waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise CannotCapture(_where(error)) from error
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():  # torch says at every call that it does not see all waits
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


def _where(error: RuntimeError) -> str:
    """The innermost line of Python that the error came through."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"line {frame.lineno} of {Path(frame.filename).name}, in {frame.name}, waits for the device"
