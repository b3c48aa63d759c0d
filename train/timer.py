"""Where the time of steps goes, by marks that cost microseconds, are read once a window and wait for no device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

PARTS = ("forward", "backward", "optimizer", "communication", "checkpoint", "validation")


class StepTimer:
    """Seconds of one rank by part; a part within another is taken out of it. On an accelerator they are of its stream.

    Communication is what stops that stream: not the exchanges of Ulysses, which are compiled into blocks, nor what goes
    on in another stream beside the backward pass, but for what is left of that at its end, which counts there.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream() if device.type == "cuda" else None
        self._open: list[str] = [""]
        self._marks: list[tuple[str, str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done within is this part; a profile shows it too."""
        inside, began = self._open[-1], self._now()
        self._open.append(name)
        try:
            with torch.profiler.record_function(f"step: {name}"):
                yield
        finally:
            self._open.pop()
            self._marks.append((name, inside, began, self._now()))

    def collective(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls what sends or waits, as communication where it stops a step."""
        is_beside = self.stream is not None and torch.cuda.current_stream() != self.stream
        if is_beside or self._open[-1] not in PARTS[:3]:
            return call(*arguments, **options)
        with self.part("communication"):
            found = call(*arguments, **options)
        if hasattr(found, "wait"):
            return SimpleNamespace(wait=lambda *given, **named: self.collective(found.wait, *given, **named))
        return found

    def read(self) -> dict[str, float]:
        """Seconds by part since the last reading."""
        marks, self._marks = self._marks, []
        if self.stream:
            self.stream.synchronize()
        found = dict.fromkeys((*PARTS, ""), 0.0)
        for name, inside, began, ended in marks:
            seconds = began.elapsed_time(ended) / 1000 if self.stream else ended - began
            found[name] += seconds
            found[inside] -= seconds
        return {name: seconds for name, seconds in found.items() if name}

    def _now(self) -> Any:
        event: Any = torch.cuda.Event
        return self.stream.record_event(event(enable_timing=True)) if self.stream else time.perf_counter()
