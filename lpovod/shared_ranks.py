"""Ranks on one machine without a launcher: processes of one thread each that share memory.

Two threads of OpenMP wait for each other by spinning, several hundred times a step, so that one
busy process beside them makes a training four times slower. Processes meet less often and sleep
while they wait. `fork_ranks` makes them; what they tell each other at every batch norm goes through
sockets, parameters and gradients lie in shared memory (`SharedParameters`).

When a process ends, however it ends, its sockets close, and that ends the others.
"""

import io
import mmap
import os
import pickle
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lpovod import progress
from lpovod.exceptions import LpovodError

PACKET = 1 << 14
"""Bytes that are sent at once: a socket's buffer holds several times as many, so that sending does
not wait for the other side to receive."""

ALIGNED = 64
"""Tensors in shared memory start at multiples of this many bytes, a line of the cache."""


class LostRank(LpovodError):
    """Another process of the training has ended."""


class Ranks:
    """This process among those that share a training.

    Args:
        rank: its number, from 0.
        links: a socket to each other rank, by its number.
    """

    def __init__(self, rank: int, links: dict[int, socket.socket]):
        self.rank, self.links = rank, links
        self.count = len(links) + 1
        self.parameters: SharedParameters | None = None

    def exchange(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, in the order of the ranks; all send equally many, one at least.

        Takes some ten microseconds after the last rank has come so far.

        Raises:
            LostRank: if another rank has ended.
        """
        if len(data) > PACKET:
            starts = range(0, len(data), PACKET)
            packets = [self.exchange(data[start : start + PACKET]) for start in starts]
            return [b"".join(parts) for parts in zip(*packets, strict=True)]
        for other in self.links:
            self._send(other, data)
        received = {other: self._receive(other) for other in self.links}
        return [data if rank == self.rank else received[rank] for rank in range(self.count)]

    def gather(self, value: Tensor) -> Tensor:
        """Every rank's tensor of one shape, (ranks, ...)."""
        own = value.detach().contiguous().numpy()
        received = bytearray().join(self.exchange(own.tobytes()))
        return torch.from_numpy(np.frombuffer(received, own.dtype)).view(self.count, *value.shape)

    def collect(self, content: bytes) -> list[bytes]:
        """On rank 0 the bytes of every rank, of any number; on the others nothing."""
        sizes = self.gather(torch.tensor(len(content))).tolist()
        if self.rank > 0:
            for start in range(0, len(content), PACKET):
                self._send(0, content[start : start + PACKET])
            return []
        whole = [content]
        for other in range(1, self.count):
            packets = range(0, sizes[other], PACKET)
            whole.append(b"".join([self._receive(other) for _ in packets]))
        return whole

    def wait(self) -> None:
        """Until all ranks have come so far."""
        self.exchange(b" ")

    def memory(self, size: int) -> mmap.mmap:
        """Bytes that all ranks read and write, zeros at first; freed when no rank uses them."""
        if self.rank == 0:
            file = os.memfd_create("lpovod")
            os.truncate(file, size)
            for other, link in self.links.items():
                try:
                    socket.send_fds(link, [b" "], [file])
                except OSError:
                    raise self._lost(other) from None
        else:
            files: list[int] = []
            with suppress(ConnectionResetError):
                _, files, _, _ = socket.recv_fds(self.links[0], 1, 1)
            if not files:
                raise self._lost(0)
            (file,) = files
        try:
            return mmap.mmap(file, size)
        finally:
            os.close(file)

    def _send(self, other: int, packet: bytes) -> None:
        try:
            self.links[other].send(packet)
        except OSError:
            raise self._lost(other) from None

    def _receive(self, other: int) -> bytes:
        with suppress(ConnectionResetError):
            if packet := self.links[other].recv(PACKET):
                return packet
        raise self._lost(other)

    def _lost(self, other: int) -> LostRank:
        return LostRank(f"process {other + 1} of {self.count} of the training has ended")

    def close(self) -> None:
        """Leave the others, who notice it when they next meet."""
        for link in self.links.values():
            link.close()


class SharedParameters:
    """Parameters in memory that all ranks see, each updated by the rank that owns it.

    The values are those of rank 0.

    Args:
        ranks: who shares them.
        parameters: moved to the shared memory in place; alike on all ranks, but for their values.
    """

    def __init__(self, ranks: Ranks, parameters: list[nn.Parameter]):
        self.ranks, self.parameters = ranks, parameters
        self.owners = _owners([p.numel() for p in parameters], ranks.count)
        *starts, size = np.cumsum([0, *(-(-p.nbytes // ALIGNED) * ALIGNED for p in parameters)])
        # One part for the values, and one for the gradients that each rank computes.
        memory = ranks.memory((1 + ranks.count) * int(size))
        values, *self.gradients = [
            [_view(memory, part * size + at, p) for at, p in zip(starts, parameters, strict=True)]
            for part in range(1 + ranks.count)
        ]
        for parameter, value in zip(parameters, values, strict=True):
            if ranks.rank == 0:
                value.copy_(parameter.detach())
            parameter.data = value
        ranks.wait()

    def forget_others(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop the optimizer's state of the parameters that other ranks own."""
        for owner, parameter in zip(self.owners, self.parameters, strict=True):
            if owner != self.ranks.rank:
                optimizer.state.pop(parameter, None)

    def step(self, optimizer: torch.optim.Optimizer, gradient_norm: float) -> None:
        """One step down the sum of all ranks' gradients, clipped to a norm; no gradient remains.

        Costs a rank a copy of its gradients of the others' parameters, for each other rank an
        addition to the gradients of its own, and the update of its own.
        """
        self._add_up_gradients()
        own = [p for p in self.parameters if p.grad is not None]
        square = get_total_norm([p.grad for p in own if p.grad is not None]).double().square()
        clip_grads_with_norm_(own, gradient_norm, self.ranks.gather(square).sum().sqrt())
        optimizer.step()
        self.ranks.wait()

    def _add_up_gradients(self) -> None:
        """Sum the gradients of this rank's own parameters over all ranks; the others' become None.

        No rank lacks one.
        """
        rank = self.ranks.rank
        for number, (owner, parameter) in enumerate(zip(self.owners, self.parameters, strict=True)):
            if owner != rank and parameter.grad is not None:
                self.gradients[rank][number].copy_(parameter.grad)
        self.ranks.wait()
        for number, (owner, parameter) in enumerate(zip(self.owners, self.parameters, strict=True)):
            if owner != rank:
                parameter.grad = None
                continue
            for other in self.ranks.links:
                assert parameter.grad is not None
                parameter.grad += self.gradients[other][number]

    def whole_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """On rank 0 the optimizer's `state_dict`, as if it had updated all parameters."""
        whole, file = optimizer.state_dict(), io.BytesIO()
        torch.save(whole["state"], file)
        for content in self.ranks.collect(file.getvalue()):
            whole["state"] |= torch.load(io.BytesIO(content), weights_only=True)
        return whole | {"state": dict(sorted(whole["state"].items()))}


def _owners(sizes: list[int], ranks: int) -> list[int]:
    """The rank of each parameter: from the largest on, the one that has least."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        owners[number] = loads.index(min(loads))
        loads[owners[number]] += sizes[number]
    return owners


def _view(memory: mmap.mmap, start: int, like: Tensor) -> Tensor:
    """A tensor of another's dtype, shape and strides in some memory."""
    flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=start)
    return flat.as_strided(like.shape, like.stride())


_current: Ranks | None = None


def current() -> Ranks | None:
    """The ranks that `fork_ranks` made of this process, if it did."""
    return _current


@contextmanager
def fork_ranks(count: int) -> Iterator[None]:
    """Run the block in this process, rank 0, and in `count` - 1 copies of it, which end there.

    Nothing may have run in several threads before. An error of a copy is raised in this process,
    which outlives the others.

    Raises:
        LostRank: if a copy was killed.
    """
    global _current
    ranks, children, reports = _fork(count)
    _current = ranks
    try:
        with _child(ranks, reports[0]) if ranks.rank else _parent(ranks, children, reports):
            yield
    finally:
        _leave()


def _fork(count: int) -> tuple[Ranks, list[int], list[socket.socket]]:
    """This process's ranks, its children, and sockets on which children report an error.

    The parent has one of these for each child, a child the one that it writes to.
    """
    pairs = {pair: _socketpair() for pair in combinations(range(count), 2)}
    reports = [_socketpair() for _ in range(1, count)]
    rank, children = 0, []
    for number in range(1, count):
        child = os.fork()
        if child == 0:
            rank = number
            progress.be_silent()
            break
        children.append(child)
    links = {}
    for numbers, ends in pairs.items():
        for number, other, end in zip(numbers, reversed(numbers), ends, strict=True):
            if number == rank:
                links[other] = end
            else:
                end.close()
    for number, (reading, writing) in enumerate(reports, start=1):
        if rank != 0:
            reading.close()
        if rank != number:
            writing.close()
    ours = [reports[rank - 1][1]] if rank else [reading for reading, _ in reports]
    return Ranks(rank, dict(sorted(links.items()))), children, ours


def _socketpair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextmanager
def _child(ranks: Ranks, report: socket.socket) -> Iterator[None]:
    """The process ends with the block; an error is reported before the others can notice."""
    status = 1
    try:
        yield
        status = 0
    except BaseException as error:
        _report(error, ranks.rank, report)
        traceback.clear_frames(error.__traceback__)  # ends processes that load images
    finally:
        os._exit(status)


def _report(error: BaseException, rank: int, report: socket.socket) -> None:
    if not isinstance(error, LpovodError):
        text = "".join(traceback.format_exception(error))[-PACKET:]
        error = RuntimeError(f"in process {rank + 1} of the training:\n{text}")
    report.send(pickle.dumps(error))


@contextmanager
def _parent(ranks: Ranks, children: list[int], reports: list[socket.socket]) -> Iterator[None]:
    """The children end with the block, or at once; the error that ended one is raised here."""
    lost = None
    try:
        yield
    except LostRank as error:
        lost = error
    finally:
        ranks.close()  # or a child would wait for this process, which waits for it
        signals = {os.WTERMSIG(os.waitpid(child, 0)[1]) for child in children} - {0}
        errors = [error for report in reports if (error := _reported(report))]
        for report in reports:
            report.close()
    if lost is None:
        return
    for error in errors:
        if not isinstance(error, LostRank):
            raise error from None
    by = " and ".join(f"signal {number}" for number in sorted(signals)) or "itself"
    raise LostRank(
        f"{lost}, by {by}. Is there memory enough? The same command resumes the training"
    ) from None


def _reported(report: socket.socket) -> Exception | None:
    with suppress(OSError):
        if packet := report.recv(1 << 20, socket.MSG_DONTWAIT):
            return pickle.loads(packet)  # of our own fork
    return None


def _leave() -> None:
    global _current
    if _current:
        _current.close()
    _current = None


# A process that loads images must not hold its rank's sockets open when that is killed.
os.register_at_fork(after_in_child=_leave)
