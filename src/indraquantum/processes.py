"""One process of a run with several: its share of the work, and what all processes agree on.

    torchrun --nproc-per-node 2 -m indraquantum train

The messages here are small (counts, sums, errors, signals of the system) and go over gloo. Gradients go through DDP or
FSDP2 (training/parallel.py), over NCCL on GPUs. Only what `whole` gathers and `from_process` sends is as large as a
gradient.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from indraquantum.errors import OutOfMemory, ProcessLost, TrainingStopped, UserError
from indraquantum.launched import launched_processes

T = TypeVar("T")
# The first process may prepare or capture for hours while the others wait. torchrun makes sure that none waits for a
# process that has ended.
PATIENCE = datetime.timedelta(days=30)
# Errors of one process that all of them raise, except OutOfMemory. SystemExit comes from a signal that asks to end.
SHARED_ERRORS = (UserError, TrainingStopped, SystemExit)
_MEETINGS = itertools.count()  # of this process with the others of its start
_PEER_IS_GONE = ("closed by peer", "reset by peer", "Broken pipe")  # in gloo's errors


class Processes:
    """One process of `world`, with the number `rank`; by default it is the only one."""

    def __init__(self, rank: int = 0, world: int = 1, group: Any = None) -> None:
        self.rank, self.world = rank, world
        self._group = group
        self.agreed = False  # whether all processes have the error that is being raised

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.world == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def share(self, items: np.ndarray) -> np.ndarray:
        """Return this process's part of `items`. All parts in the order of ranks are `items`; some may be empty."""
        return np.array_split(items, self.world)[self.rank]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over all processes, in float64."""
        if self.alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self._group)
        return total.tolist()

    def largest(self, value: int) -> int:
        """Return the largest value of all processes."""
        if self.alone:
            return value
        largest = torch.tensor(value)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(largest)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values = [value] * self.world
        if not self.alone:
            torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` in the first process while the others wait. All return its value, or raise its error."""
        if self.alone:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = action()
            except SHARED_ERRORS as error:
                outcome[1] = error
        # A process that the same signal has already ended gets no message.
        with contextlib.suppress(*([RuntimeError] if isinstance(outcome[1], SystemExit) else [])):
            torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        self._raise(outcome[1])
        return outcome[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an error of one process becomes the error of all, so that none waits forever for one that failed.

        The code inside must not wait for other processes itself, except where all of them meet the same errors. An
        OutOfMemory is raised at once, because it may come where the others wait: they end when this process is gone.
        """
        if self.alone:
            yield
            return
        own = None
        try:
            yield
        except OutOfMemory:
            raise
        except SHARED_ERRORS as error:
            own = error
        if self.largest(own is not None):
            self._raise(next(error for error in self.gather(own) if error is not None))

    def _raise(self, error: BaseException | None) -> None:
        if error is not None:
            self.agreed = True
            raise error


ALONE = Processes()


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the other processes that torchrun has started, if any. Inside, only the first one prints.

    An error that all of them share is raised in all, and told by the first one alone.

    Raises:
        ProcessLost: another process is gone while this one waits for it.
    """
    world = launched_processes()
    if world == 1:
        yield ALONE
        return
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    if one_machine and sys.platform == "linux":
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")  # not reachable from other machines
    # A program may train twice in the same processes. One that is quicker than its peers must not find old addresses.
    store = torch.distributed.PrefixStore(f"meeting {next(_MEETINGS)}", _store(one_machine))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=world)
    rank = torch.distributed.get_rank()
    processes = Processes(rank, world, torch.distributed.new_group(backend="gloo", timeout=PATIENCE))
    end_together = False
    try:
        with contextlib.ExitStack() as stack:
            if rank:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield processes
        end_together = True
    except SystemExit:  # a signal, which ends all of them at the same step
        end_together = True
        raise
    except (UserError, TrainingStopped) as error:
        end_together = processes.agreed
        error.is_told = bool(rank and processes.agreed)
        raise
    except RuntimeError as error:
        text = str(error)
        if "gloo" not in text or not any(part in text for part in _PEER_IS_GONE):
            raise
        raise ProcessLost(f"process {rank}: another process of this run ended, so this one ends too") from None
    finally:
        # NCCL would wait for the others, who may be waiting for this process. torchrun ends them when it is gone.
        if end_together or not torch.cuda.is_available():
            torch.distributed.destroy_process_group()


@functools.cache
def _store(one_machine: bool) -> torch.distributed.Store:
    """Return the store through which the processes of this start find each other, always the same one."""
    own = store_of_this_start() if one_machine else None
    if own is not None:
        return own
    store, _, _ = next(torch.distributed.rendezvous("env://"))
    return store


def store_of_this_start() -> torch.distributed.Store | None:
    """Return a store through which the processes of this start find each other; None if torch's own does that.

    torchrun keeps one store over all its restarts (torch 2.13, `DynamicRendezvousHandler.next_rendezvous`). A process
    that is quicker than its peers would find the addresses of ended processes there. Each of torchrun's agents counts
    restarts for itself, so only on one machine is the count the same for all.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False)
    return torch.distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def own_device(device: torch.device) -> torch.device:
    """Return `device`, or this process's accelerator if torchrun has started several processes.

    Raises:
        UserError: there are more processes than accelerators, or the device supports one process only.
    """
    if launched_processes() == 1:
        return device
    there = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "mps":
        raise UserError("--device", device, "must be cpu with more than one process")
    if device.type == "cuda":
        if there > torch.cuda.device_count():
            allowed = f"must be at most {torch.cuda.device_count()}, one process for each GPU; or --device cpu"
            raise UserError("--nproc-per-node", there, allowed)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def from_process(processes: Processes, rank: int, value: Tensor) -> Tensor:
    """Return `value` of the process with number `rank` in all processes; it is written into their own `value`."""
    if not processes.alone:
        torch.distributed.broadcast(value, src=rank)  # over the group of the gradients, because it is as large
    return value


def is_sharded(value: Tensor) -> bool:
    """Return whether `value` is a DTensor, of which each process holds a part."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Return a sharded tensor gathered from all processes, which must all call this; other tensors are unchanged."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of `value`, sharded like `like`; `value` itself if `like` is not sharded.

    The processes do not communicate: each takes its part from the whole.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
