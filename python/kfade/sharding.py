"""Models that other libraries have spread over ranks: FSDP2, whose parameters are shards, and DDP, which wraps.

A sharded parameter is a `DTensor`: each rank has some of its rows. A module gathers its own while it runs, so forward
and backward passes are collectives that all ranks go through the same number of times. Here whole tensors exist one
layer at a time; the output projection alone is kept whole, since its product with the loss rows is taken by chunks.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from .errors import StorageError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper of DDP, which synchronises what kfade sums up on its own."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has spread the model over ranks."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def class_of(model: nn.Module) -> type:
    """The class of a model before FSDP2 has put one of its own in its place."""
    return type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)


def check_sharding(model: nn.Module, group: ProcessGroup | None) -> None:
    """Look whether the shards of a model are those of a group.

    Raises:
        ValueError: the model is sharded and there is no group or one of another size, or it is sharded by more than
            FSDP2.
    """
    reshard(model)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        if group is None:
            raise ValueError(
                "model is sharded and group is None; it must be the group of the ranks that have the shards, such as"
                " torch.distributed.group.WORLD"
            )
        if parameter.device_mesh.size() != group.size():
            raise ValueError(
                f"model is sharded over {parameter.device_mesh.size()} ranks and group has {group.size()}; they must be"
                " the same"
            )
        if not is_sharded(model) or sum(isinstance(p, Shard) for p in parameter.placements) > 1:
            raise ValueError(f"model has {name} as {parameter.placements}; it must be sharded by FSDP2 alone")


def reshard(model: nn.Module) -> None:
    """Let go of gathered parameters, so that `parameters()` gives shards: some are kept after a forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a sharded one gathered, which all ranks do together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, which every rank has whole, sharded as a parameter is; nothing is sent."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gradient_divisor(model: nn.Module, ranks: int) -> float:
    """By what FSDP2 divides the sum over ranks of gradients: by their number, unless it was told otherwise.

    Raises:
        ValueError: its modules were told different things.
    """
    factors: set[float | None] = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            several = getattr(state, "_fsdp_param_groups", None)
            groups = [state._fsdp_param_group] if several is None else several
            factors |= {group.gradient_divide_factor for group in groups if group is not None}
    if len(factors) > 1:
        raise ValueError(f"model has gradient divide factors {sorted(map(str, factors))}; there must be one")
    factor = factors.pop() if factors else None
    return float(ranks if factor is None else factor)


@torch.no_grad()
def load_shards(model: nn.Module, directory: str | Path) -> None:
    """Fill the parameters of a sharded model from safetensors files, of which each rank reads its own shards alone.

    Neither a whole state dict nor a whole parameter is in memory. Buffers stay as they are.

    Args:
        model: sharded by FSDP2, its parameters allocated (`model.to_empty(device=...)` after the meta device).
        directory: with one or more safetensors files, whose tensors have the names of the model's parameters.

    Raises:
        StorageError: a file cannot be read, or a parameter is in none, or there in another shape.
    """
    reshard(model)
    try:
        where: dict[str, Path] = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        for name, parameter in model.named_parameters():
            if name not in where:
                raise StorageError(f"{directory} has no tensor {name}; it must have all parameters of the model")
            with safe_open(where[name], framework="pt") as file:
                stored = file.get_slice(name)
                shape = list(parameter.shape)
                if stored.get_shape() != shape:
                    raise StorageError(
                        f"{where[name]} has {name} of shape {stored.get_shape()}; the model's is {shape}"
                    )
                mine = shard_of(parameter)
                begin: tuple[int, ...] = (0,) * mine.ndim
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    _, begin = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
                if mine.numel():
                    mine.copy_(stored[tuple(slice(b, b + n) for b, n in zip(begin, mine.shape, strict=True))])
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{directory} cannot be read: {error}") from error
