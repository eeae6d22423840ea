"""Processes that `torchrun` or `accelerate launch` has started: what they say of themselves, and their group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .ranks import Ranks


def launched() -> tuple[int, int]:
    """The rank of this process and the number of all; (0, 1) without a launcher."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """`cuda` as the device of this process among those of its machine; any other device as it is."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and launched()[1] > 1 else device


@contextmanager
def group_of_all(device: str) -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes that a launcher started; None for one process alone.

    Args:
        device: that this process computes on.
    """
    if launched()[1] == 1:
        yield None
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        # All processes end by the error of one, also where they do what is not shared.
        with Ranks(dist.group.WORLD):
            yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
