"""The processes that build together, as `accelerate launch` started them: their messages, and how they fail as one."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from ..errors import ProcessError, SubspaceError

LONGEST = timedelta(days=1)  # one process waits so long for another that is neither done nor gone
FACTS = "facts"


class ProcessGroup:
    """The processes of a build; one alone unless `process_group` says otherwise.

    They meet in `exchange` only, all of them and in the same order. Where one fails, the others are told so at their
    next exchange.

    Attributes:
        index: the number of this process, from 0.
        count: how many processes there are.
        machines: per process its machine's name.
        run: the same text in all of them, another one in every run.
        marker: a file that a process which fails writes, where one is agreed on and the disk is shared: the others
            need not finish first.
    """

    def __init__(self) -> None:
        self.index, self.count, self.run = 0, 1, ""
        self.machines = [platform.node()]
        self.marker: Path | None = None
        self._group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is the first process, which writes and prints."""
        return self.index == 0

    @property
    def name(self) -> str:
        """``process 1 of 4 on host``, counted from 0; empty for one alone."""
        return self.name_of(self.index) if self.count > 1 else ""

    def name_of(self, index: int) -> str:
        """Return ``process 1 of 4 on host`` for any of the processes."""
        return f"process {index} of {self.count} on {self.machines[index].split('/')[0]}"

    @property
    def neighbours(self) -> list[int]:
        """The ranks of the processes on this machine, this one's among them."""
        return [index for index, machine in enumerate(self.machines) if machine == self.machines[self.index]]

    def join(self, group: Any, index: int, count: int) -> None:
        """Take part in a process group of torch.

        Args:
            group: of gloo's.
            index: the number of this process.
            count: how many processes there are.
        """
        self._group, self.index, self.count = group, index, count
        # two containers may have one host's name, but not one network address
        machine, run = f"{platform.node()}/{uuid.getnode():x}", uuid.uuid4().hex[:12]
        told = [json.loads(text) for text in self.exchange(json.dumps([machine, run]).encode())]
        self.machines, self.run = [each[0] for each in told], told[0][1]

    def deal(self, costs: Mapping[str, float]) -> dict[str, int]:
        """Deal tasks to the processes: the dearest first, each to the process that has least so far.

        Args:
            costs: of every task, by name.

        Returns:
            By task the number of its process; the same in every process.
        """
        filled = [0.0] * self.count
        dealt = {}
        for name in sorted(costs, key=lambda name: -costs[name]):
            owner = filled.index(min(filled))
            filled[owner] += costs[name]
            dealt[name] = owner
        return dealt

    def exchange(self, payload: bytes = b"") -> list[bytes]:
        """Return the payloads of all processes, in their order.

        Raises:
            ProcessError: one of them has failed; says which, and how.
        """
        return [payload] if self._group is None else self._meet(payload, failed=False)

    def share(
        self, facts: Any, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> list[tuple[Any, dict[str, torch.Tensor]]]:
        """Exchange JSON and tensors on the CPU, see `exchange`."""
        return [unpacked(each) for each in self.exchange(packed(facts, tensors or {}))]

    def stopped(self) -> bool:
        """Return whether a process is known to have failed, so that going on is in vain."""
        return self.marker is not None and self._group is not None and self.marker.exists()

    def report_error(self, error: BaseException) -> None:
        """Let the others raise a `ProcessError` at their next exchange."""
        if self._group is None:
            return
        with contextlib.suppress(OSError):
            if self.marker is not None:
                self.marker.parent.mkdir(parents=True, exist_ok=True)
                self.marker.write_text(self.name, encoding="utf-8")
        with contextlib.suppress(ProcessError):
            self._meet(f"{type(error).__name__}: {error}".encode(), failed=True)

    def close(self) -> None:
        """Leave the process group of torch."""
        if self._group is not None:
            group, self._group = self._group, None
            if self.marker is not None and self.main:
                with contextlib.suppress(OSError):
                    self.marker.unlink()
            torch.distributed.destroy_process_group(group)

    def _meet(self, payload: bytes, failed: bool) -> list[bytes]:
        from torch import distributed as dist

        try:
            sizes = [torch.zeros(2, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([failed, len(payload)]), group=self._group)
            given = []
            for index, (_, size) in enumerate(torch.stack(sizes).tolist()):
                buffer = torch.empty(size, dtype=torch.uint8)
                if index == self.index and size:
                    buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
                if size:
                    dist.broadcast(buffer, src=dist.get_global_rank(self._group, index), group=self._group)
                given.append(payload if index == self.index else buffer.numpy().tobytes())
        except RuntimeError as error:
            raise ProcessError(
                f"{self.name}: another process has gone, or was silent for {LONGEST.days * 24} hours"
                f" ({str(error).splitlines()[0]}). See what it printed last; with a work folder, the same call goes on"
                " from what is finished."
            ) from error
        for index, (bad, _) in enumerate(torch.stack(sizes).tolist()):
            if bad and not failed:
                raise ProcessError(f"{self.name_of(index)} failed: {given[index].decode(errors='replace')}")
        return given


ALONE = ProcessGroup()
_active: ProcessGroup | None = None


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Yield the processes that this one builds with.

    An inner block has its caller's. A function can be decorated with it, too. Processes are those of accelerate's
    `PartialState`, or of the process group that is there. They leave the block together: an error in one is raised in
    all, in the others as a `ProcessError` that names it.
    """
    global _active
    if _active is not None:
        yield _active
        return
    processes = _active = ProcessGroup()
    try:
        _join(processes)
        yield processes
        processes.exchange()
    except ProcessError:
        raise
    except Exception as error:
        processes.report_error(error)
        raise
    finally:
        _active = None
        processes.close()


def _join(processes: ProcessGroup) -> None:
    dist = torch.distributed
    if not dist.is_available():
        return
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE") or 1) < 2:
            return
        from accelerate import PartialState

        # without a GPU it has to be told, or it takes each process for one alone
        PartialState(cpu=not torch.accelerator.is_available())
        # torch aborts a process that leaves with a group of gloo's
        atexit.register(_end)
        if not dist.is_initialized():
            raise SubspaceError(
                f"This process was started as one of {os.environ['WORLD_SIZE']}, but has no process group of"
                " torch.distributed: PartialState was made before, alone, or the launcher is one for TPUs. Build in"
                " one process."
            )
    if dist.get_world_size() > 1:
        # a group of its own: on the CPU, and patient, since shares of a large fleet take longer than a training step
        group = dist.new_group(backend="gloo", timeout=LONGEST)
        processes.join(group, dist.get_rank(), dist.get_world_size())


def _end() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def packed(facts: Any, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return JSON-ready facts and tensors as the bytes of a safetensors file."""
    return save({key: value.contiguous() for key, value in tensors.items()}, {FACTS: json.dumps(facts)})


def unpacked(payload: bytes) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return facts and tensors from the bytes that `packed` made."""
    size = int.from_bytes(payload[:8], "little")
    return json.loads(json.loads(payload[8 : 8 + size])["__metadata__"][FACTS]), load(payload)


def disagreeing(values: Sequence[Any]) -> int | None:
    """Return the first process whose value is not the main process's, or None."""
    return next((index for index, value in enumerate(values) if value != values[0]), None)
