"""`FactorTracker`: the Kronecker factors of a model that is being trained.

Every so many steps, the last training batch is run once more at the weights as they are, up to the gradients of the
layers' outputs, and its sums are added to a running average. The pass is one of ours, like that of `fit`: no
gradient, mode, flag or random state of the training loop is touched, and neither loss scaling, nor gradient
accumulation, nor a data-parallel reducer can be seen in the factors.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from kfade_kernels import PackedSymmetric
from kfade_kernels.packed import packed_elements
from torch import Tensor, nn

from .capture import deterministic_mode, frozen, graph_from_embeddings, trace
from .config import FitConfig, _integer, _number
from .curvature import Curvature
from .decomposition import decompose_states
from .errors import NonFiniteError
from .factors import FactorCollector, collect_factors
from .fisher import loss_count
from .layer_curvature import LayerCurvature, new_states
from .layers import Layer, select
from .loss import Batch, Head, check_batch
from .models import device_of, model_id, state_dtype
from .storage import read_marked, write_tensors

FORMAT = "kfade-tracked-factors"
VERSION = 1
_FIELDS = ("input_ids", "attention_mask", "labels")
# Seeds of successive updates are so far apart: a prime, which no small seed or number of samples bridges.
_SEED_STRIDE = 15_485_863


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what DistributedDataParallel, `torch.compile` and their like put around it."""
    while True:
        children = dict(model.named_children())
        name, inner = next(iter(children.items()), ("", model))
        if len(children) != 1 or name not in ("module", "_orig_mod"):
            return model
        model = inner


@dataclass
class _LastBatch:
    """A forward pre-hook that keeps the arguments of the last training forward, by reference.

    A class, and not a function of the tracker: a model with it can still be pickled, and copied without the factors.

    Attributes:
        names: the parameters of `forward`, for what is given by position.
        batch: what of `input_ids`, `attention_mask` and `labels` was given.
        listening: False during a pass of our own.
    """

    names: Sequence[str]
    batch: dict[str, Tensor] | None = None
    listening: bool = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listening and module.training and torch.is_grad_enabled():
            given = {**dict(zip(self.names, args, strict=False)), **kwargs}
            self.batch = {name: given[name] for name in _FIELDS if given.get(name) is not None}


def update_seed(config: FitConfig, updates: int) -> int:
    """The seed of the labels of update number `updates`, from 0: a sequence that comes again gets other labels."""
    return config.seed + _SEED_STRIDE * updates


def _sum_over_ranks(states: Mapping[str, LayerCurvature], device: torch.device) -> None:
    """Add up sums and counts of all processes, in place; packed triangles are what is sent."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    counts = torch.tensor([[s.positions, s.losses] for s in states.values()], dtype=torch.float64, device=device)
    dist.all_reduce(counts)
    for state, (positions, losses) in zip(states.values(), counts.tolist(), strict=True):
        state.positions, state.losses = positions, losses
        for total in (state.a_sum if state.group == state.name else None, state.s_sum):
            if total is not None:
                dist.all_reduce(total.data)


def check_tracking(config: FitConfig | None, every: int, decay: float) -> FitConfig:
    """The options of a FactorTracker, checked; its default for no `config`."""
    config = FitConfig(curvature="kfac") if config is None else config
    if not isinstance(config, FitConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be a FitConfig")
    if config.curvature != "kfac":
        raise ValueError(
            f"config.curvature is {config.curvature!r}; it must be 'kfac': eigenvalues Λ need eigenvectors that"
            " do not change while they are collected, so fit them with kfade.fit on a model that is not trained"
        )
    if config.layers_per_pass is not None:
        raise ValueError(
            f"config.layers_per_pass is {config.layers_per_pass}; it must be None: running factors of all layers"
            " are kept anyway, so select fewer modules where memory is short"
        )
    if config.rank is not None:
        raise ValueError(f"config.rank is {config.rank}; it must be None: running factors are kept whole")
    if config.max_factor_order is not None:
        raise ValueError(
            f"config.max_factor_order is {config.max_factor_order}; it must be None: running factors are kept whole"
        )
    _integer("every", every, 1)
    _number("decay", decay, minimum=0.0)
    if decay > 1:
        raise ValueError(f"decay is {decay}; it must be at most 1")
    return config


class FactorTracker:
    """Running Kronecker factors of a model, collected beside its training loop.

    With update k's sums A_k and counts P_k, the running ones are `Σ_k decay^(K−k) A_k` and `Σ_k decay^(K−k) P_k`, and
    their quotient is a weighted mean from the first update on: no bias to correct.

    Where `torch.distributed` is initialised, each process collects from its own batches and the sums of an update are
    added over all of them, so that every process has the same factors. All must then call `step` (or `update`) equally
    often.

    Args:
        model: a causal language model as `kfade.fit` takes it, or what DistributedDataParallel, accelerate or
            `torch.compile` made of it; weights are whole on every process. It gets one forward pre-hook, until `close`.
        config: options of the fit, of `curvature="kfac"` (the default here) and without `layers_per_pass`.
        every: `step` collects on its first call (or the first that can), and on each `every`-th after it.
        decay: weight in [0, 1] of the sums so far when new ones are added; 1 keeps plain sums, 0 the last batch.

    Raises:
        TypeError: `model` is not a module, or an option has a wrong type.
        ValueError: an option is out of range, or `config` asks for what cannot be tracked.
        UnsupportedLayerError: a selected layer cannot be handled exactly.
    """

    def __init__(
        self, model: nn.Module, config: FitConfig | None = None, *, every: int = 10, decay: float = 0.95
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
        config = check_tracking(config, every, decay)
        self.config, self.every, self.decay = config, every, float(decay)
        self._model = unwrapped(model)
        self._layers: list[Layer] = select(self._model, config.modules)
        self._traced = False
        self._states: dict[str, LayerCurvature] = {}
        self._calls = self._updates = 0
        self._last = _LastBatch(list(inspect.signature(self._model.forward).parameters))
        self._handle = self._model.register_forward_pre_hook(self._last, with_kwargs=True)

    def __enter__(self) -> FactorTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hook; the factors stay."""
        self._handle.remove()
        self._last.batch = None

    @property
    def updates(self) -> int:
        """How many batches were added (of all processes together, one an update)."""
        return self._updates

    @property
    def factors(self) -> dict[str, LayerCurvature]:
        """The running factors by layer name, without eigenvectors; empty before the first update.

        An update makes new states and leaves these as they are: read them again to see it.
        """
        return dict(self._states)

    def step(self) -> bool:
        """Count a step of the loop, and collect where one is due from the last batch the model was trained on.

        Call it once a step of the optimiser, before or after it. A batch that holds no loss position, or gives a NaN or
        an infinity (the optimiser's or the scaler's business), is left out with a warning.

        Returns:
            Whether something was collected, on any process.

        Raises:
            RuntimeError: the model was not run in training mode, with gradients enabled, since the hook was set.
        """
        # A first batch that could not be added must not leave a whole interval without factors.
        due = self._calls % self.every == 0 or not self._states
        self._calls += 1
        if not due:
            return False
        if self._last.batch is None:
            raise RuntimeError(
                "no batch was seen: model must have been called, in training mode and with gradients enabled,"
                " before step()"
            )
        added, problem = self._add(check_batch(self._last.batch, self._updates, device_of(self._model)))
        if problem is not None:
            warnings.warn(f"a batch was left out of the tracked factors: {problem}", RuntimeWarning, stacklevel=2)
        return added

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Collect from this batch now, at the weights as they are.

        Args:
            batch: as `kfade.fit` takes it.

        Raises:
            TypeError, ValueError: it is no such batch, or has no loss position.
            NonFiniteError: it gives a NaN or an infinity. Nothing of it is in the factors.
        """
        _, problem = self._add(check_batch(batch, self._updates, device_of(self._model)))
        if problem is not None:
            raise problem

    def _add(self, batch: Batch) -> tuple[bool, ValueError | None]:
        """Add a batch to the running factors; whether any process had something to add, and what was wrong here."""
        device, dtype = device_of(self._model), state_dtype(self._model)
        problem: ValueError | None = None
        try:
            self._last.listening = False
            fresh = self._collect(batch, device, dtype)
        except NonFiniteError as error:
            problem = error
        finally:
            self._last.listening = True
        if not len(batch.loss_index):
            problem = ValueError(
                f"batch {batch.index} has no loss position: every label is -100 (ignored) or belongs to padding"
            )
        if problem is not None:
            # Other processes may have something to add, and wait for this one's part.
            fresh = new_states(self._layers, 0)
            FactorCollector(fresh, dtype, device).finish()
        _sum_over_ranks(fresh, device)
        if not any(state.losses for state in fresh.values()):
            return False, problem
        for state in fresh.values() if self._states else ():
            before = self._states[state.name]
            state.positions += self.decay * before.positions
            state.losses += self.decay * before.losses
            assert state.s_sum is not None and before.s_sum is not None
            state.s_sum.data.add_(before.s_sum.data, alpha=self.decay)
            if state.group == state.name:
                assert state.a_sum is not None and before.a_sum is not None
                state.a_sum.data.add_(before.a_sum.data, alpha=self.decay)
        for state in fresh.values():
            state.positions, state.losses = float(state.positions), float(state.losses)
        # All at once, so that an interruption leaves the factors as they were.
        self._states, self._updates = fresh, self._updates + 1
        return True, problem

    def _collect(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, LayerCurvature]:
        """Factors of one batch at the weights as they are."""
        model, config = self._model, replace(self.config, seed=update_seed(self.config, self._updates))
        tracked = {module for layer in self._layers for module in layer.modules}
        with (
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            deterministic_mode(model),
            frozen(model),
            graph_from_embeddings(model),
        ):
            # Made anew: it compares and reads the output projection, which is being trained too.
            head = Head(model, batch, tracked, config.autocast)
            if not self._traced:
                self._trace(head, batch)
            states = new_states(self._layers, loss_count([batch], config))
            if len(batch.loss_index):
                collect_factors(head, self._layers, [batch], config, FactorCollector(states, dtype, device))
        return states

    def _trace(self, head: Head, batch: Batch) -> None:
        layers = trace(head, self._layers, batch)
        regrouped = [x.name for x in layers if self._states and self._states[x.name].group != x.group]
        if regrouped:
            raise ValueError(f"the loaded state has other input groups than the model: {regrouped} differ")
        self._layers, self._traced = layers, True

    def curvature(self) -> Curvature:
        """A K-FAC curvature of the model's recent past from the running factors, decomposed as `kfade.fit` does.

        Raises:
            RuntimeError: nothing was collected yet.
            NonFiniteError: a factor overflowed.
        """
        if not self._states:
            raise RuntimeError("nothing was collected yet: call step() or update() first")
        states = {name: replace(state) for name, state in self._states.items()}
        if self.config.decomposition == "eigh":
            decompose_states(states)
        return Curvature(replace(self.config), model_id(self._model), states)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on with the same bits: numbers, texts, and tensors that no update changes.

        `calls` and `updates`; `layers` with their counts and groups by name; `factors`, the packed sums as
        `NAME.s_sum` and, where a layer leads its input group, `NAME.a_sum`.
        """
        layers, factors = {}, {}
        for name, state in self._states.items():
            layers[name] = {"group": state.group, "positions": state.positions, "losses": state.losses}
            assert state.a_sum is not None and state.s_sum is not None
            factors[f"{name}.s_sum"] = state.s_sum.data
            if state.group == name:
                factors[f"{name}.a_sum"] = state.a_sum.data
        return {
            "calls": self._calls,
            "updates": self._updates,
            "fisher": self.config.fisher,
            "layers": layers,
            "factors": factors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; its tensors are copied.

        Raises:
            ValueError: it is no such state, or one of other layers or of another Fisher. Nothing is changed.
        """
        missing = [key for key in ("calls", "updates", "fisher", "layers", "factors") if key not in state]
        if missing:
            raise ValueError(f"state has no {', '.join(missing)}; it must be what state_dict() returned")
        if state["fisher"] != self.config.fisher:
            raise ValueError(
                f"state has factors of the {state['fisher']} Fisher; config.fisher is {self.config.fisher!r}"
            )
        given, sums = state["layers"], state["factors"]
        names = {layer.name for layer in self._layers}
        if given and set(given) != names:
            raise ValueError(f"state has other layers than the model: {sorted(names ^ set(given))} differ")
        states = new_states([replace(x, group=given[x.name]["group"]) for x in self._layers if given], 0)
        device, dtype = device_of(self._model), state_dtype(self._model)

        def packed(name: str, order: int) -> PackedSymmetric:
            data = sums.get(name)
            shape = None if data is None else list(data.shape)
            if shape != [packed_elements(order)]:
                raise ValueError(f"state has {name} of shape {shape}; it must be [{packed_elements(order)}]")
            return PackedSymmetric.from_packed(data.to(device, dtype, copy=True), order)

        for one in states.values():
            if given[one.name]["group"] not in names:
                raise ValueError(f"state has {one.name} in the group {one.group!r}, which is no layer")
            one.positions, one.losses = float(given[one.name]["positions"]), float(given[one.name]["losses"])
            one.s_sum = packed(f"{one.name}.s_sum", one.d_out)
            if one.group == one.name:
                one.a_sum = packed(f"{one.name}.a_sum", one.width_in)
        for one in states.values():
            one.a_sum = states[one.group].a_sum
        if self._traced and any(states[x.name].group != x.group for x in self._layers if states):
            raise ValueError("state has other input groups than the model")
        self._states, self._calls, self._updates = states, int(state["calls"]), int(state["updates"])

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, whole or not at all."""
        state = self.state_dict()
        tensors = state.pop("factors")
        write_tensors(
            Path(path), tensors, {"format": FORMAT, "version": str(VERSION), "state": json.dumps(state, sort_keys=True)}
        )

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            StorageError: it is missing, corrupt, something else, or of a future version.
            ValueError: it belongs to other layers or another Fisher.
        """
        tensors, metadata = read_marked(Path(path), FORMAT, VERSION)
        self.load_state_dict({**json.loads(metadata["state"]), "factors": tensors})
