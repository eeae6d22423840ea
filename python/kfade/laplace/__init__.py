"""Laplace approximation: a Gaussian posterior over the weights of some layers, from a fitted curvature.

For a model trained to minimise the summed cross-entropy of N tokens plus `τ/2 ‖θ − μ‖²`, the posterior around its
weights θ̂ is

    N(θ̂, P⁻¹)    with    P = N F + τ I,

where F is the curvature of the *token mean* and τ the precision of the Gaussian prior around μ (MacKay 1992; with
Kronecker factors: Ritter, Botev and Barber 2018; Daxberger et al. 2021, arXiv 2106.14806). In the eigenbasis of F it
is diagonal, `N Λ + τ`, so nothing is approximated beyond F. `P / N` is F with absolute damping `τ/N`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from kfade_kernels.arguments import finite
from torch import Tensor, nn

from ..calibration import Mixture, Predictive
from ..capture import Capture, deterministic_mode, frozen, graph_from_embeddings, trace
from ..curvature import Curvature, fitted_layers
from ..layers import Layer, output_head
from ..linearise import linearised_rows
from ..loss import Batch, Head, check_batches, require_finite, sequence_groups
from ..models import device_of, model_id, state_dtype
from ..operators import CurvatureOperator, checked_layers
from ..progress import Progress
from ..update import Update
from .evidence import best_precision, precision_evidence
from .logits import Term, add_logits, candidate_logits, vocabulary_size
from .variance import Basis, Jacobians, head_variance, one_each

METHODS = ("linearised", "sampled", "map")
# Bytes of the mean distributions that exist at a time: each position takes one number a word.
MEAN_BYTES = 1 << 28


class LogitVariance(NamedTuple):
    """Logits of the asked-for tokens at each loss position, and their posterior variance, `[N, C]` each, on the CPU.

    Attributes:
        tokens: the tokens, int64.
        logits: of the model as it is.
        variance: under the linearised model; in squared logits.
    """

    tokens: Tensor
    logits: Tensor
    variance: Tensor


def _above_zero(name: str, value: object) -> float:
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} is {number}; it must be greater than 0")
    return number


def _natural(name: str, value: object, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < minimum:
        raise ValueError(f"{name} is {value}; it must be at least {minimum}")
    return value


class Laplace:
    """The posterior `N(θ̂, (N F + τ I)⁻¹)` of some layers' weights; the other weights are known.

    Args:
        model: a causal language model, as `fit` takes it. θ̂ are its weights; it is left as it was.
        curvature: fitted on this model, of any of the four kinds; best the sampled Fisher on the training set.
        layers: the name of one layer, names of some, or None for all of the curvature.
        prior_precision: τ > 0, one number or one for each layer by name.
        tokens: N > 0, the loss positions of the *training* set; None for those that the curvature was fitted on.
            Larger where it was fitted on a part of them. A posterior at temperature T, `N(θ̂, (N F / T + τ I)⁻¹)`,
            has `tokens = N / T`.
        prior_mean: μ by parameter name, such as the `state_dict()` of the model before fine-tuning; None for 0.

    Attributes:
        model, curvature, tokens: as given.
        layers: their names, in the order of the curvature.
        prior_precision: τ by layer name.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: an unknown layer, a bad precision or number of tokens, a curvature of other layers, a prior mean
            that lacks a parameter or has it in another shape, or no `tokens` with a curvature that counts none
            (identity).
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        layers: str | Sequence[str] | None = None,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        tokens: float | None = None,
        prior_mean: Mapping[str, Tensor] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
        self._states = {state.name: state for state in checked_layers(curvature, layers)}
        if curvature.config.rank is not None:
            raise ValueError(
                f"curvature was fitted with rank {curvature.config.rank}; variances need every direction: it must be"
                " fitted with rank None"
            )
        if curvature.config.max_factor_order is not None:
            raise ValueError(
                f"curvature was fitted with max_factor_order {curvature.config.max_factor_order}; it must be fitted"
                " with max_factor_order None"
            )
        self.model, self.curvature, self.layers = model, curvature, list(self._states)
        if tokens is None:
            # In one pass, A and S rest on some of the data and Λ on the others.
            apart = curvature.config.basis_share is not None
            counts = (s.losses + (s.lambda_losses or 0) if apart else s.lambda_count for s in self._states.values())
            tokens = max(counts) / curvature.config.samples
            if not any(s.losses for s in self._states.values()):
                raise ValueError(
                    f"tokens is None and the {curvature.config.curvature} curvature counts no loss positions;"
                    " it must be the number of loss positions of the training set"
                )
        self.tokens = _above_zero("tokens", tokens)
        self.prior_precision = self._precisions(prior_precision)
        found = {layer.name: layer for layer in fitted_layers(model, curvature)}
        self._layers = [found[name] for name in self.layers]
        self._prior_mean = prior_mean
        self._distances = {layer.name: self._distance(layer) for layer in self._layers}
        self._operators = {
            name: CurvatureOperator(curvature, name, damping=damping, kind="absolute")
            for name, damping in self.dampings.items()
        }

    def __repr__(self) -> str:
        values = sorted(set(self.prior_precision.values()))
        shown = f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
        kind, number = self.curvature.config.curvature, len(self.layers)
        return f"Laplace({kind}, {number} layers, tokens={self.tokens:g}, prior_precision={shown})"

    def _precisions(self, given: float | Mapping[str, float]) -> dict[str, float]:
        if not isinstance(given, Mapping):
            return dict.fromkeys(self.layers, _above_zero("prior_precision", given))
        if set(given) != set(self.layers):
            raise ValueError(f"prior_precision has layers {sorted(given)}; it must have {sorted(self.layers)}")
        return {name: _above_zero(f"prior_precision of {name}", given[name]) for name in self.layers}

    def _distance(self, layer: Layer) -> float:
        """`‖θ̂ − μ‖²` of a layer, in float64."""
        total = 0.0
        for name, parameter in layer.parameters().items():
            value = parameter.detach().double()
            if self._prior_mean is not None:
                if name not in self._prior_mean:
                    raise ValueError(f"prior_mean has no {name}; it must have every parameter of the layers")
                mean = self._prior_mean[name]
                if mean.shape != value.shape:
                    raise ValueError(
                        f"prior_mean has {name} of shape {list(mean.shape)}; it must be {list(value.shape)}"
                    )
                value = value - mean.detach().to(value)
            total += float(value.square().sum())
        return total

    @property
    def dampings(self) -> dict[str, float]:
        """`τ/N` by layer name: with it as absolute damping `Curvature.solve` is N times the posterior covariance."""
        return {name: value / self.tokens for name, value in self.prior_precision.items()}

    def with_prior_precision(self, prior_precision: float | Mapping[str, float]) -> Laplace:
        """The posterior under another prior precision.

        Raises:
            TypeError, ValueError: it is not a number, or for each layer one, greater than 0.
        """
        return Laplace(
            self.model,
            self.curvature,
            self.layers,
            prior_precision=prior_precision,
            tokens=self.tokens,
            prior_mean=self._prior_mean,
        )

    # ---- marginal likelihood

    def _spectra(self, names: Sequence[str]) -> list[Tensor]:
        """`N Λ` of some layers, float64."""
        return [self.tokens * self._states[name].eigenvalues().double() for name in names]

    def log_marginal_likelihood(
        self,
        data: float | Iterable[Mapping[str, Tensor]],
        prior_precision: float | Mapping[str, float] | None = None,
    ) -> float:
        """`log p(D) ≈ log p(D | θ̂) + log N(θ̂; μ, I/τ) + ½ D log 2π − ½ logdet P`, in nats, with D parameters.

        Args:
            data: `−log p(D | θ̂)`, the cross-entropy summed over the N training tokens, in nats; or all training
                batches, on which it is then measured.
            prior_precision: another τ than that of this posterior; what varies with it costs one pass over Λ.

        Raises:
            TypeError, ValueError: a bad precision, or batches with another number of loss positions than N.
        """
        precisions = self.prior_precision if prior_precision is None else self._precisions(prior_precision)
        if isinstance(data, Iterable):
            batches = list(data)
            checked = check_batches(batches, device_of(self.model), "data")
            positions = sum(len(batch.loss_index) for batch in checked)
            if positions != self.tokens:
                raise ValueError(
                    f"data has {positions} loss positions and tokens is {self.tokens:g}; it must be all training"
                    " batches, or their summed loss"
                )
            nll = -float(self.predictive(batches, "map").log_probabilities.double().sum())
        else:
            nll = finite("data", data)
        parts = (
            precision_evidence(self._spectra([name]), self._distances[name], precision)
            for name, precision in precisions.items()
        )
        return sum(parts) - nll

    def fit_prior_precision(self, *, per_layer: bool = False) -> Laplace:
        """The posterior with the τ that maximises the marginal likelihood: empirical Bayes, without held-out data.

        Args:
            per_layer: one τ for each layer; the evidence is a sum over layers, so each is found alone.

        Raises:
            ValueError: there is no maximum, because the weights are the prior mean or the curvature is 0.

        Cost: some ten passes over Λ.
        """
        if not per_layer:
            return self.with_prior_precision(best_precision(self._spectra(self.layers), sum(self._distances.values())))
        return self.with_prior_precision(
            {name: best_precision(self._spectra([name]), self._distances[name]) for name in self.layers}
        )

    # ---- draws

    def _coloured(self, name: str, noise: Tensor) -> dict[str, Tensor]:
        """`P^(−1/2) z` of a layer by parameter name, for `z [D]`."""
        operator = self._operators[name]
        return operator.to_mapping((operator.inverse_sqrt() @ noise.to(operator.device)) / math.sqrt(self.tokens))

    def sample(self, seed: int = 0) -> Update:
        """A draw of `θ − θ̂`, as an update that can be applied to the model, removed, and saved.

        Args:
            seed: of the draw; PyTorch's own random state is neither read nor changed.

        A model in 16 bits rounds what is added to its own resolution, which may be more than the posterior's standard
        deviation; the linearised predictive does not.
        """
        generator = torch.Generator().manual_seed(_natural("seed", seed, 0))
        tensors: dict[str, Tensor] = {}
        for name, operator in self._operators.items():
            # An identity curvature has no dtype of its own.
            dtype = state_dtype(self.model) if self.curvature.config.curvature == "identity" else operator.dtype
            noise = torch.randn(operator.shape[0], generator=generator, dtype=dtype)
            tensors.update(self._coloured(name, noise))
        return Update(tensors, model_id(self.model))

    @contextmanager
    def drawn(self, seed: int = 0) -> Iterator[nn.Module]:
        """The model with the draw of `sample(seed)` in its weights; afterwards they have their bits back."""
        update = self.sample(seed)
        update.apply_(self.model)
        try:
            yield self.model
        finally:
            update.remove_(self.model)

    # ---- predictions

    def _parts(self, head: Head) -> tuple[list[Layer], Layer | None]:
        """The layers below the loss rows, and the output projection if it is one of ours and maps rows to logits."""
        projection = output_head(self.model) if head.weight is not None else None
        outer = [layer for layer in self._layers if projection is not None and projection in layer.modules]
        return [layer for layer in self._layers if layer not in outer], outer[0] if outer else None

    def _rows(
        self, head: Head, layers: Sequence[Layer], method: str, batches: Sequence[Batch], change: Mapping[str, Tensor]
    ) -> list[tuple[Tensor, ...]]:
        """The loss rows of each batch, and their derivative if they are linearised."""
        if method == "linearised":
            return [linearised_rows(self.model, head, layers, batch, change) for batch in batches]
        below = {name: change[name] for layer in layers for name in layer.parameters()} if method == "sampled" else {}
        update = Update(below)
        update.apply_(self.model)
        try:
            return [(head.rows(batch),) for batch in batches]
        finally:
            update.remove_(self.model)

    @staticmethod
    def _terms(head: Head, outer: Layer | None, rows: Sequence[Tensor], change: Mapping[str, Tensor]) -> list[Term]:
        """The parts of one model's logits: a small change has a term of its own, which 16 bits do not round away."""
        terms = [Term(x, head.weight, None if i else head.bias) for i, x in enumerate(rows)]
        if outer is not None and change:
            weight, bias = change[f"{outer.name}.weight"], change.get(f"{outer.name}.bias")
            device = rows[0].device
            terms.append(Term(rows[0], weight.to(device), None if bias is None else bias.to(device)))
        return terms

    @torch.no_grad()
    def predictive(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        method: str = "linearised",
        *,
        samples: int = 32,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Predictive:
        """The mean predictive distribution over draws of the weights, at each loss position.

        The integral of a softmax over a Gaussian has no closed form; a mean over S draws is unbiased, with an error
        that falls as `1/√S`. Draw s is `sample(seed + s)` for both methods.

        Args:
            batches: as `fit` takes them.
            method: `linearised` draws logits of the model linearised in its weights, `f + J (θ − θ̂)`, by a forward-mode
                product a draw: F is the exact Hessian of that model, and it does not leave the region where F
                means something (Immer, Korzepa and Bauer 2021, arXiv 2008.08217). `sampled` puts draws into the model.
                `map` is the model as it is. In an output projection alone the first two are the same.
            samples: S, the draws; too few of them cost likelihood.
            seed: of the draws.
            progress: where to show progress and record costs.

        Raises:
            TypeError, ValueError: a bad argument, no batch, or labels outside the vocabulary.
            UnsupportedLayerError: forward-mode derivatives do not reach a layer.
            NonFiniteError: a batch gives a NaN or an infinity; it is named.

        Cost: a forward pass a draw (`sampled`), or about three (`linearised`); none but the first where only the output
        projection is drawn. Draws are made again for every `MEAN_BYTES` of mean distributions.
        """
        if method not in METHODS:
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
        _natural("samples", samples, 1)
        _natural("seed", seed, 0)
        models = 1 if method == "map" else samples
        device, dtype = device_of(self.model), state_dtype(self.model)
        checked = check_batches(batches, device)
        total = models * sum(batch.tokens for batch in checked)
        with deterministic_mode(self.model), (progress or Progress()).stage(f"predictive, {method}", total) as stage:
            # Checkpoints only cost here, and hide forward-mode derivatives.
            self.model.eval()
            head = Head(self.model, checked[0], (), self.curvature.config.autocast)
            layers, outer = self._parts(head)
            vocabulary = vocabulary_size(head, checked)
            longest = max(batch.input_ids.shape[1] for batch in checked)
            found = []
            for group in sequence_groups(checked, max(1, MEAN_BYTES // (longest * vocabulary * dtype.itemsize))):
                mixture = Mixture(torch.cat([batch.targets for batch in group]), vocabulary, dtype)
                # The rows change only where something below them is drawn.
                fixed = None if layers and method != "map" else self._rows(head, layers, "map", group, {})
                for s in range(models):
                    change = {} if method == "map" else self.sample(seed + s).tensors
                    rows = self._rows(head, layers, method, group, change) if fixed is None else fixed
                    start = 0
                    for batch, parts in zip(group, rows, strict=True):
                        for x in parts:
                            require_finite(x, batch, "what enters the softmax")
                        terms = self._terms(head, outer, parts, change)
                        start = add_logits(mixture, start, terms, len(parts[0]), vocabulary, dtype)
                        stage.advance(batch.tokens)
                found.append(mixture.mean(models))
        return Predictive.joined(found)

    def logit_variance(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        candidates: int | Sequence[int] = 8,
        *,
        progress: Progress | None = None,
    ) -> LogitVariance:
        """The variance of logits under the linearised model at each loss position: `J P⁻¹ Jᵀ`, without sampling.

        Args:
            batches: as `fit` takes them; labels say which positions are asked about.
            candidates: how many tokens are asked about, the most probable ones of each position; or which ones, the
                same at every position.
            progress: where to show progress and record costs.

        Raises:
            TypeError, ValueError: a bad argument, no batch, or candidates outside the vocabulary.
            UnsupportedLayerError, NonFiniteError: as `fit`.

        Cost: in the output projection a few products, `2·V·d` FLOPs a token that is asked about. Below it the Jacobian
        takes one backward pass for each candidate and loss position of the longest sequence: ask about few, such as
        the first token of an answer.
        """
        if isinstance(candidates, Sequence):
            listed = [_natural("candidates", c, 0) for c in candidates]
            if not listed:
                raise ValueError("candidates is empty; it must hold at least one token")
            count = len(listed)
        else:
            listed, count = [], _natural("candidates", candidates, 1)
        device, dtype = device_of(self.model), state_dtype(self.model)
        checked = check_batches(batches, device)
        with deterministic_mode(self.model), frozen(self.model), graph_from_embeddings(self.model):
            head = Head(self.model, checked[0], (), self.curvature.config.autocast)
            layers, outer = self._parts(head)
            vocabulary = vocabulary_size(head, checked)
            if max(listed, default=count - 1) >= vocabulary:
                raise ValueError(f"candidates is {candidates}; the vocabulary has {vocabulary} tokens")
            layers = trace(head, layers, checked[0])
            bases = {layer.name: self._basis(layer.name, dtype, device) for layer in layers}
            jacobians = Jacobians(bases, dtype, device)
            capture = Capture(head, layers, jacobians)
            found = []
            with (progress or Progress()).stage("variance of logits", sum(b.tokens for b in checked)) as stage:
                for batch in checked:
                    with torch.set_grad_enabled(bool(layers)), capture.running(batch) as rows:
                        h = rows.detach()
                        require_finite(h, batch, "what enters the softmax")
                        term = Term(h, head.weight, head.bias)
                        tokens, logits = candidate_logits(term, listed, count, vocabulary, dtype)
                        variance = torch.zeros_like(logits)
                        if layers:
                            for at, c, gradient in one_each(rows, head.weight, tokens, batch):
                                jacobians.begin(batch.loss_index[at] // batch.input_ids.shape[1], len(batch.input_ids))
                                rows.backward(gradient, retain_graph=True)
                                capture.flush(batch)
                                variance[at, c] = jacobians.found()
                    if outer is not None:
                        variance += self._outer_variance(outer, h.to(dtype), tokens)
                    found.append((tokens.cpu(), logits.cpu(), variance.cpu()))
                    stage.advance(batch.tokens)
        return LogitVariance(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _basis(self, name: str, dtype: torch.dtype, device: torch.device) -> Basis:
        state = self._states[name]
        q_out = q_in = None
        if state.q_out is not None:
            q_out, q_in = (q.to(device, dtype) for q in (state.output_eigenvectors(), state.input_eigenvectors()))
        spectrum = state.eigenvalues().to(device, dtype)
        return Basis(q_out, q_in, 1 / (self.tokens * spectrum + self.prior_precision[name]))

    def _outer_variance(self, outer: Layer, h: Tensor, tokens: Tensor) -> Tensor:
        """What the output projection's weights give to the variance of logits `[n, C]`."""
        wide = torch.cat([h, h.new_ones(len(h), 1)], dim=1) if outer.has_bias else h
        return head_variance(self._basis(outer.name, h.dtype, h.device), wide, tokens)
