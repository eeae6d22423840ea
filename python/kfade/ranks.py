"""The ranks of a process group: who runs which batch, how they meet, and how the failure of one ends the others.

What is small (counts, measured sums, names of files) goes through the group's store as JSON. There ranks meet before
tensors are exchanged, so that a rank which fails, or is gone, ends the others with its name and leaves none of them in
a collective. A rank that is told to stop tells the others there too: each stops where it can go on later, a meeting
that one of them does not come to any more is over, and none ends before all have left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .errors import Interrupted, RankError
from .loss import Batch

# Every rank gives a sign of life so often; one that gave none for so long is taken for dead.
BEAT_SECONDS = 1.0
SILENT_SECONDS = 10.0
# One that gave none yet may be loading a model: PyTorch's own limit for collectives.
ENTER_SECONDS = 1_800.0
# How long a rank sleeps between two looks at whether the others have come.
_LOOKS = (0.0005, 0.02)


def share_out(costs: Sequence[float], ranks: int, before: Sequence[float] | None = None) -> list[int]:
    """A rank for each item, the dearest first and each to the one with the least so far.

    Args:
        costs: of the items.
        ranks: how many there are.
        before: what ranks have from earlier on, which decides between equals; then the lower number does.
    """
    now = [0.0] * ranks
    earlier = before or [0.0] * ranks
    chosen = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[item] = min(range(ranks), key=lambda r: (now[r], earlier[r] + now[r], r))
        now[chosen[item]] += costs[item]
    return chosen


class _Watch:
    """A thread that gives signs of life, looks for those of the next rank, and hears of failures.

    Each rank looks at one other, so that the traffic of the store grows with the number of ranks only.

    Attributes:
        store: of the group.
        prefix: of all names there.
        meetings: how often ranks have met.
        stopping: whether a rank was told to stop; set here, the others hear of it.
        left: what the first rank that was interrupted has said; None while all are there.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        self.store: dist.Store = dist.distributed_c10d._get_process_group_store(group)
        # Each rank counts its own: one that failed at once may come to the next before another to this one.
        self.prefix, self.meetings = f"kfade/{self.store.add(f'kfade/runs/{rank}', 1)}", 0
        self._rank = rank
        self._next = (rank + 1) % size
        self._failure: str | None = None
        self.stopping = False
        self.left: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kfade-ranks", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last, heard, number = b"", time.monotonic(), 0
        failed, theirs = f"{self.prefix}/failed", f"{self.prefix}/beat/{self._next}"
        stopping, left = f"{self.prefix}/stopping", f"{self.prefix}/interrupted"
        try:
            while not self._end.is_set() and self._failure is None:
                self.store.set(f"{self.prefix}/beat/{self._rank}", str(number))
                number += 1
                beat = self.store.get(theirs) if self.store.check([theirs]) else b""
                if beat != last:
                    last, heard = beat, time.monotonic()
                limit = SILENT_SECONDS if last else ENTER_SECONDS
                if time.monotonic() - heard > limit and not self.store.check([self._gone(self._next)]):
                    self.report(f"rank {self._next} gave no sign of life for {limit:g} s: it has ended")
                if self.store.check([failed]):
                    self._failure = self.store.get(failed).decode()
                if self.stopping:
                    self.store.set(stopping, "")
                if self.left is None and self.store.check([left]):
                    self.left = self.store.get(left).decode()
                if self.left is not None or self.store.check([stopping]):
                    self.stopping = True
                self._end.wait(BEAT_SECONDS)
        except Exception as error:
            # Under torchrun the launcher keeps the store, else usually rank 0.
            self._failure = f"the store of the process group is gone, so the process that kept it has ended: {error}"

    def report(self, failure: str) -> None:
        """Tell all ranks; the first failure counts."""
        self.store.compare_set(f"{self.prefix}/failed", "", failure)

    def raise_if_failed(self) -> None:
        if self._failure is not None:
            raise RankError(self._failure)

    def raise_if_interrupted(self) -> None:
        if self.left is not None:
            raise Interrupted(self.left)

    def wait(self) -> None:
        """Raise the failure, or the interruption, of a rank that has gone, when it is noticed."""
        until = time.monotonic() + SILENT_SECONDS + 3 * BEAT_SECONDS
        while time.monotonic() < until:
            self.raise_if_failed()
            self.raise_if_interrupted()
            time.sleep(BEAT_SECONDS / 10)

    def _gone(self, rank: int) -> str:
        return f"{self.prefix}/gone/{rank}"

    def leave(self, message: str) -> None:
        """Tell all ranks that this one was interrupted, and comes to no meeting any more."""
        self.store.compare_set(f"{self.prefix}/interrupted", "", message)
        self.store.set(self._gone(self._rank), "")

    def wait_until_all_have_left(self, size: int) -> None:
        """Return when all ranks were interrupted, or one failed: a launcher kills the others when the first ends."""
        # Who is interrupted once more, or without a store, waits for nobody.
        with suppress(KeyboardInterrupt, RuntimeError):
            while self._failure is None and not self.store.check([self._gone(rank) for rank in range(size)]):
                time.sleep(_LOOKS[1])

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def take_leave(self, size: int) -> None:
        """Leave the store, after the last meeting: rank 0, which often keeps it, when all others have."""
        if self._failure is not None:
            return
        if self._rank:
            self.store.add(f"{self.prefix}/left", 1)
            return
        until = time.monotonic() + SILENT_SECONDS
        while self.store.add(f"{self.prefix}/left", 0) < size - 1 and time.monotonic() < until:
            time.sleep(_LOOKS[0])


def _is_lost_connection(error: BaseException) -> bool:
    """Whether another process ended while this one waited for it in a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


# The groups that are entered; a context within another one is part of it.
_ENTERED: dict[dist.ProcessGroup, _Watch] = {}


class Ranks:
    """The processes of a group; a context, which all of them leave together or by an error.

    Without a group it is this process alone, and no method does anything.

    Args:
        group: whose ranks take part; all of them enter.

    Attributes:
        group: itself.
        rank, size: of this process in the group, and how many there are.

    Raises:
        TypeError: `group` is no process group.
        RankError: while inside, another rank failed or has ended; the message names it.
        Interrupted: while inside, another rank was interrupted; with its message.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"group is {group!r}; it must be a process group such as torch.distributed.group.WORLD, or None"
            )
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self._stopping = False

    def __enter__(self) -> Ranks:
        if self.group is not None:
            self._outermost = self.group not in _ENTERED
            if self._outermost:
                _ENTERED[self.group] = _Watch(self.group)
            self._watch = _ENTERED[self.group]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.group is None:
            return
        ended = error
        try:
            if error is None:
                self.gather(None)
            elif not isinstance(error, RankError | KeyboardInterrupt):
                if _is_lost_connection(error):
                    self._watch.wait()
                self._watch.report(f"rank {self.rank} failed: {type(error).__name__}: {error}")
        except BaseException as heard:
            ended = heard
            raise
        finally:
            if isinstance(ended, KeyboardInterrupt):
                self._watch.leave(str(ended))
            if self._outermost:
                self._end(ended)

    def _end(self, ended: BaseException | None) -> None:
        orderly = ended is None or isinstance(ended, Interrupted)
        if isinstance(ended, Interrupted):
            self._watch.wait_until_all_have_left(self.size)
        assert self.group is not None
        _ENTERED.pop(self.group).close()
        if orderly:
            self._watch.take_leave(self.size)

    # ---- interruptions

    @property
    def stopping(self) -> bool:
        """Whether this rank or another was told to stop; it is heard of within a second or two."""
        return self._stopping if self.group is None else self._watch.stopping

    def stop(self) -> None:
        """Tell all ranks to stop where they can go on later; may be called by the handler of a signal."""
        if self.group is None:
            self._stopping = True
        else:
            self._watch.stopping = True

    # ---- what is small

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, in their order; all ranks come here.

        Raises:
            RankError: another rank does not come, since it failed.
            Interrupted: another rank does not come, since it was interrupted.
        """
        if self.group is None:
            return [value]
        watch = self._watch
        keys = [f"{watch.prefix}/{watch.meetings}/{rank}" for rank in range(self.size)]
        watch.store.set(keys[self.rank], json.dumps(value))
        pause, longest = _LOOKS
        while not watch.store.check(keys):
            watch.raise_if_failed()
            # Who left after this meeting has come to it.
            if watch.left is not None and not watch.store.check(keys):
                watch.raise_if_interrupted()
            time.sleep(pause)
            pause = min(longest, 2 * pause)
        if watch.meetings:
            # Whoever has come here has read what was told at the last meeting.
            watch.store.delete_key(f"{watch.prefix}/{watch.meetings - 1}/{self.rank}")
        watch.meetings += 1
        return [json.loads(watch.store.get(key)) for key in keys]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in their order: the same bits on each."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def require_same(self, values: Mapping[str, str]) -> None:
        """Raise ValueError, on all ranks, for a value that is not the same on all of them.

        Args:
            values: by what the error calls them.
        """
        first, *others = self.gather(values)
        for rank, other in enumerate(others, 1):
            for name, value in other.items():
                if value != first[name]:
                    raise ValueError(
                        f"{name} of rank {rank} differ from those of rank 0; every rank must have the same"
                    )

    # ---- batches

    def share(self, batches: Sequence[Batch]) -> list[int]:
        """The rank that runs each batch."""
        return share_out([batch.input_ids.numel() for batch in batches], self.size)

    def mine(self, batches: Sequence[Batch], runners: Sequence[int], idle: Batch | None = None) -> list[Batch]:
        """The batches of this rank, in their order.

        Args:
            batches: all of them.
            runners: the rank of each.
            idle: what a rank with fewer batches than another runs in their place, where all must run as many.
        """
        mine = [batch for batch, runner in zip(batches, runners, strict=True) if runner == self.rank]
        if idle is not None and batches:
            mine += [idle] * (max(runners.count(rank) for rank in range(self.size)) - len(mine))
        return mine

    def deliver(
        self,
        matrices: Mapping[str, Tensor],
        shapes: Iterable[tuple[str, tuple[int, int]]],
        owners: Mapping[str, int],
        like: Tensor,
    ) -> Iterator[tuple[str, Tensor]]:
        """Each matrix, which its owner has, with its name; one at a time, to be used before the next.

        Args:
            matrices: those that this rank owns.
            shapes: of all, by name.
            owners: of all.
            like: a tensor of their dtype and device.
        """
        self.gather(None)
        for name, shape in shapes:
            here = owners[name] == self.rank
            matrix = matrices[name].contiguous() if here else like.new_empty(shape)
            if self.group is not None:
                dist.broadcast(matrix, group_src=owners[name], group=self.group)
            yield name, matrix

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; ends with RankError where another rank failed meanwhile."""
        for batch in batches:
            self.check()
            yield batch

    def check(self) -> None:
        """Raise RankError if another rank failed."""
        if self.group is not None:
            self._watch.raise_if_failed()

    # ---- tensors

    def reduce(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Add up tensors over ranks, each at its owner; elsewhere they are undefined afterwards."""
        if self.group is None:
            return
        self.gather(None)
        for tensor, owner in tensors:
            dist.reduce(tensor, group_dst=owner, group=self.group)

    def broadcast(self, tensors: Iterable[tuple[Tensor, int]]) -> None:
        """Give all ranks what the owner of each contiguous tensor has in it."""
        if self.group is None:
            return
        self.gather(None)
        for tensor, owner in tensors:
            dist.broadcast(tensor, group_src=owner, group=self.group)


class Shares:
    """Which rank runs which batch, when some of them are run again and again: always the same one.

    Args:
        ranks: who they are.
        idle: what a rank with fewer batches than another runs in their place; None for nothing.
    """

    def __init__(self, ranks: Ranks, idle: Batch | None) -> None:
        self._ranks, self._idle = ranks, idle
        self._runners: dict[int, int] = {}
        self._kept: list[Batch] = []

    def mine(self, batches: Iterable[Batch]) -> list[Batch]:
        """The batches of this rank; new ones are shared out."""
        batches = list(batches)
        new = [batch for batch in batches if id(batch) not in self._runners]
        self._runners.update(zip(map(id, new), self._ranks.share(new), strict=True))
        self._kept += new
        return self._ranks.mine(batches, [self._runners[id(batch)] for batch in batches], self._idle)
