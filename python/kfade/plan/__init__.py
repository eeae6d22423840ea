"""What a fit will take, before anything runs: FLOPs, bytes, seconds and peak memory of each stage, and its passes.

The model is built from its configuration without weights and run on tensors without values (see `simulation`);
the rest is arithmetic on widths (`stages`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..config import FitConfig
from ..layer_curvature import LayerCurvature
from ..layers import Layer, in_passes, select
from ..loss import Batch, check_batch
from ..models import DTYPES, configuration_of, outline_model
from ..progress import return_freed_memory
from ..rates import GIB, TABLE, UNTIMED, Rates, calibrate, rates_of, resident_bytes, resident_part
from ..simulation import Footprint, simulate
from .result import MemoryPlan, Plan
from .sizes import Basis, Workload
from .stages import Model, highest
from .text import assumptions, places, reasons

__all__ = ["Plan", "Workload", "plan", "plan_fit", "plan_model", "plan_run"]


def _candidates(model: Model) -> Iterable[int | None]:
    """Layers a pass, fewest passes first."""
    given = model.config.layers_per_pass
    yield given
    if given is not None or model.config.curvature == "identity":
        return
    count, last = len(model.layers), None
    for passes in range(2, count + 1):
        at_most = -(-count // passes)
        if at_most != last:
            last = at_most
            yield at_most


def _choose(model: Model, limit: float | None) -> tuple[int | None, list[MemoryPlan]]:
    """The fewest passes that fit, else those that need least."""
    best: tuple[int | None, list[MemoryPlan]] | None = None
    for at_most in _candidates(model):
        memory = model.memory(in_passes(model.layers, at_most))
        if best is None or highest(model, memory) < highest(model, best[1]):
            best = at_most, memory
        if limit is None or highest(model, memory) <= limit:
            return at_most, memory
    assert best is not None
    return best


def _plan(name: str, model: Model, parameters: int, limit: float | None) -> Plan:
    at_most, memory = _choose(model, limit)
    passes = in_passes(model.layers, at_most)
    peak, load = highest(model, memory), model.load
    return Plan(
        name, model.config.curvature, model.config.rank, model.config.max_factor_order, model.config.basis_share,
        model.basis is not None, str(model.dtype).removeprefix("torch."), model.rates.name, model.devices,
        load.tokens, load.sequences, load.size, load.length, parameters, tuple(x.name for x in model.layers),
        at_most, len(passes), model.stored, tuple(model.stages(passes)), tuple(memory),
        tuple(places(model, passes)), peak, limit, limit is None or peak <= limit,
        tuple(reasons(model, at_most, memory, limit)), tuple(assumptions(model, memory)),
    )  # fmt: skip


def _weights(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, and bytes of parameters and buffers."""
    buffers = sum(b.nbytes for b in model.buffers())
    return sum(p.numel() for p in model.parameters()), sum(p.nbytes for p in model.parameters()) + buffers


def _vocabulary(model: nn.Module, foot: Footprint) -> int:
    if not foot.projects:
        return foot.rows[1]
    weight: torch.Tensor = model.get_output_embeddings().weight  # type: ignore[operator]
    return int(weight.shape[0])


def plan_model(
    model: nn.Module,
    name: str,
    load: Workload,
    config: FitConfig,
    rates: Rates = UNTIMED,
    *,
    devices: int = 1,
    limit: float | None = None,
    stored: bool = True,
    simulated: tuple[list[Layer], Footprint] | None = None,
    basis: Basis | None = None,
) -> Plan:
    """The plan of the fit of a model that is here, with weights or on `meta`.

    Args:
        model: a causal language model.
        name: of the model, for the plan.
        load: the data.
        config: of the fit; its `layers_per_pass` is kept where it is given.
        rates: of the device.
        devices: how many share the work.
        limit: memory of a device in bytes, or None for no limit.
        stored: whether the fit is given a directory to save in as it goes.
        simulated: what `simulate` gave for this model and data, where several plans share it.
        basis: where the basis of an earlier fit is; None where A, S and eigenvectors are fitted.

    Raises:
        ValueError: the selection matches nothing; or the configuration has no use for a basis, or has a `state_device`
            with several devices, or of a GPU beside a CPU.
        UnsupportedLayerError: a layer cannot be handled, or what the model does depends on its data.
    """
    if basis is not None:
        require_use_of_basis(config)
    if config.state_device is not None:
        if devices > 1:
            raise ValueError(
                f"config.state_device is {config.state_device!r} and devices is {devices}, which share the fit; it must"
                " be None"
            )
        if rates.kind == "cpu" and config.state_device != "cpu":
            raise ValueError(
                f"config.state_device is {config.state_device!r} and the device is a CPU; it must be 'cpu'"
            )
    layers, foot = simulated or simulate(
        model, select(model, config.modules), load.size, load.length, config.autocast, config.samples
    )
    parameters, weights = _weights(model)
    blocks = int(getattr(getattr(model, "config", None), "num_hidden_layers", 0) or 0)
    dtype = max((p.dtype for p in model.parameters()), key=lambda d: d.itemsize)
    sizes = Model(
        layers,
        foot,
        config,
        load,
        rates,
        dtype,
        weights,
        _vocabulary(model, foot),
        devices,
        blocks,
        stored,
        basis,
    )
    return _plan(name, sizes, parameters, limit)


def plan(
    model: str | Path,
    tokens: int,
    seq_len: int,
    config: FitConfig | None = None,
    *,
    batch_size: int = 8,
    device: str = "cpu",
    devices: int = 1,
    dtype: str = "float32",
    rates: Rates | None = None,
    basis: bool = False,
) -> Plan:
    """What a fit will take, from the model's configuration alone.

    Args:
        model: a directory, a `config.json`, a .gguf file, or a name on the Hugging Face hub. No weights are read.
        tokens: of the retain set, which is taken for full sequences.
        seq_len: tokens a sequence.
        config: of the fit. Its `device_memory` is the limit, in GiB; without it, a GPU's own memory is.
        batch_size: sequences a batch.
        device: `cpu`, which is measured for two seconds, or a GPU: A100, H100, H200, B200 or L40S.
        devices: how many share the work. More than one is an estimate that no measurement was held to.
        dtype: of the weights.
        rates: of the device, instead of those known by its name.
        basis: whether the fit is given the basis of an earlier one, which is read from files.

    Raises:
        TypeError: a number is no integer, or `basis` is no bool.
        ValueError: an argument is out of range, the model is not found, or its modules match nothing.
        UnsupportedLayerError: a layer cannot be handled, or what the model does depends on its data.
    """
    config = config or FitConfig()
    for name, value, least in (
        ("tokens", tokens, 2), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1), ("devices", devices, 1),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; it must be an integer")
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if not isinstance(basis, bool):
        raise TypeError(f"basis is {basis!r}; it must be a bool")
    if tokens < seq_len:
        raise ValueError(f"tokens is {tokens}; it must be at least seq_len, {seq_len}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    settings = configuration_of(str(model))
    longest = getattr(settings, "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        raise ValueError(f"seq_len is {seq_len}; {model} takes at most {longest}")
    known = rates or rates_of(device)
    sequences = -(-tokens // seq_len)
    size = min(batch_size, sequences)
    load = Workload(tokens, sequences, -(-sequences // size), size, seq_len)
    limit = known.memory if known.kind == "cuda" else None
    if config.device_memory is not None:
        limit = config.device_memory * GIB
    outline = outline_model(settings, dtype)
    # A CPU maps it from its files.
    given = Basis(copied=known.kind != "cpu") if basis else None
    return plan_model(outline, str(model), load, config, known, devices=devices, limit=limit, basis=given)


def plan_fit(
    model: nn.Module,
    batches: Sequence[Batch],
    config: FitConfig,
    *,
    stored: bool,
    name: str = "",
    rates: Rates = UNTIMED,
    basis: Mapping[str, LayerCurvature] | None = None,
) -> Plan:
    """The plan of a fit of a loaded model on checked batches; what the device holds now counts as taken.

    Args:
        model, batches, config: of the fit.
        stored: whether it is given a directory to save in as it goes.
        name: of the model.
        rates: of the device; memory alone needs none.
        basis: that the fit is given.

    Raises:
        ValueError: `config.device_memory` is less than the fit needs, however it is split.
    """
    limit = None if config.device_memory is None else config.device_memory * GIB
    device = next(model.parameters()).device
    if limit is not None:
        # The fit does so too: what others have freed is not taken.
        return_freed_memory()
    taken: float = torch.cuda.memory_reserved(device) if device.type == "cuda" else resident_bytes()
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    given = None if basis is None else _basis_now(basis, device, stored)
    taken -= _weights(model)[1] + (0 if given is None else given.resident)
    now = replace(rates, kind=device.type, process=max(0.0, taken), threads=threads)
    found = plan_model(model, name, Workload.of(batches), config, now, limit=limit, stored=stored, basis=given)
    if not found.fits:
        advice = (
            ""
            if stored or config.rank is not None
            else "; finished layers leave memory where the fit has a directory to save them in"
        )
        raise ValueError(
            f"device_memory is {config.device_memory:g} GiB; it must be at least"
            f" {math.ceil(100 * found.peak_bytes / GIB) / 100:g}{advice}. {found.reasons[0]}"
        )
    return found


def require_use_of_basis(config: FitConfig) -> None:
    """Raise ValueError unless a fit with this configuration can take A, S and eigenvectors from an earlier one."""
    if config.curvature != "ekfac":
        raise ValueError(f"a basis is given and config.curvature is {config.curvature!r}; it must be 'ekfac'")
    if config.basis_share is not None:
        raise ValueError(f"a basis is given and config.basis_share is {config.basis_share}; give one of them")


def _basis_now(basis: Mapping[str, LayerCurvature], device: torch.device, stored: bool) -> Basis:
    """Where a basis is, and how much of what a fit reads of it takes memory of the device now."""
    fields = ("q_in", "q_out", "a_sum", "s_sum") if stored else ("q_in", "q_out")
    values = [getattr(state, field) for state in basis.values() for field in fields]
    tensors = [x if isinstance(x, torch.Tensor) else x.data for x in values if x is not None]
    copied = any(x.device.type != device.type for x in tensors)
    return Basis(copied, 0 if copied else resident_part(tensors))


def plan_run(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    config: FitConfig,
    name: str,
    store: Path,
    basis: Mapping[str, LayerCurvature] | None = None,
) -> Plan:
    """The plan of a run of `kfade fit`, with the rates of its device: a GPU's by its name, a CPU's measured.

    Raises:
        ValueError: as `plan_fit`, or a batch is not as it must be.
    """
    device = next(model.parameters()).device
    checked = [check_batch(batch, i, device) for i, batch in enumerate(batches)]
    if device.type == "cuda":
        known = torch.cuda.get_device_name(device)
        rates = next((rates for key, rates in TABLE.items() if key in known), TABLE["A100"])
    else:
        rates = calibrate(store)
    return plan_fit(model, checked, config, stored=True, name=name, rates=rates, basis=basis)
