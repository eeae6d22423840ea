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
from kfade_kernels.precision import float32_products
from kfade_kernels.sampled_cross_entropy.pytorch import rows_per_chunk
from torch import Tensor, nn

from .calibration import Mixture, Predictive
from .capture import (
    Capture,
    Pair,
    deterministic_mode,
    frozen,
    graph_from_embeddings,
    rows_of,
    trace,
)
from .curvature import Curvature, fitted_layers
from .layers import Layer, output_head
from .linearise import linearised_rows
from .loss import Batch, Head, check_batches, check_targets, require_finite, sequence_groups
from .models import device_of, model_id, state_dtype
from .operators import CurvatureOperator, checked_layers
from .progress import Progress
from .update import Update

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


class _Term(NamedTuple):
    """A part `rows · weightᵀ + bias` of logits; the rows themselves where there is no weight."""

    rows: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None

    def of(self, part: slice, dtype: torch.dtype) -> Tensor:
        rows = self.rows[part]
        if self.weight is None:
            return rows.to(dtype)
        return nn.functional.linear(rows.to(self.weight.dtype), self.weight, self.bias).to(dtype)


# ------------------------------------------------------------------------------------------------ formulas


def precision_evidence(spectra: Sequence[Tensor], distance: float, precision: float) -> float:
    """What depends on τ in the log marginal likelihood: `−½ (τ ‖θ̂ − μ‖² + Σ log(1 + NΛ/τ))`.

    Args:
        spectra: `N Λ` of each layer, float64.
        distance: `‖θ̂ − μ‖²`.
        precision: τ.
    """
    return -0.5 * (precision * distance + sum(float(torch.log1p(x / precision).sum()) for x in spectra))


def best_precision(spectra: Sequence[Tensor], distance: float) -> float:
    """The τ > 0 that maximises `precision_evidence`: where `τ ‖θ̂ − μ‖² = Σ NΛ / (NΛ + τ)` (MacKay 1992).

    The left side rises with τ and the right side, the number of parameters that the data determine, falls: there is
    one solution. It is found by Newton's method in log τ, kept within a bracket.

    Raises:
        ValueError: there is none, because θ̂ is the prior mean or Λ is 0 everywhere.
    """
    rank = sum(int((x > 0).sum()) for x in spectra)
    if not distance > 0 or rank == 0:
        what = "the weights are the prior mean" if rank else "the curvature is 0"
        raise ValueError(f"prior_precision has no best value, since {what}; it must be given")

    def excess(log_precision: float) -> tuple[float, float]:
        precision = math.exp(log_precision)
        shares = [x / (x + precision) for x in spectra]
        determined = sum(float(share.sum()) for share in shares)
        slope = sum(float((share * (1 - share)).sum()) for share in shares)
        return determined - precision * distance, -slope - precision * distance

    high = math.log(rank / distance)
    step, low = 1.0, high - 1.0
    while excess(low)[0] < 0:
        step *= 2
        low -= step
    at = high
    for _ in range(200):
        value, slope = excess(at)
        low, high = (at, high) if value > 0 else (low, at)
        newton = at - value / slope
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - at) <= 1e-13 * max(1.0, abs(at)):
            return math.exp(following)
        at = following
    return math.exp(at)


class _Basis(NamedTuple):
    """A layer's posterior: Q_S and Q_A (None for the identity), and the variances v `[d_out, d_in (+ 1)]` there."""

    q_out: Tensor | None
    q_in: Tensor | None
    variances: Tensor


def head_variance(basis: _Basis, h: Tensor, tokens: Tensor) -> Tensor:
    """`Var(f_c) = Σ_ij (Q_S[c, i])² (Q_Aᵀ h)_j² v_ij` of logits `f = W h`.

    Args:
        basis: of W `[V, d]`.
        h: rows `[n, d]`, with a last column of ones if there is a bias.
        tokens: c, int64 `[n, C]`.

    Returns:
        `[n, C]`. Cost: `2·V·d` FLOPs a word of the vocabulary that is asked for anywhere.
    """
    asked, place = tokens.unique(return_inverse=True)
    with float32_products():
        by_word = basis.variances[asked] if basis.q_out is None else basis.q_out[asked].square() @ basis.variances
        squares = (h if basis.q_in is None else h @ basis.q_in).square()
        result = squares.new_empty(tokens.shape)
        for c in range(tokens.shape[1]):
            result[:, c] = (squares * by_word[place[:, c]]).sum(1)
    return result


def gradient_variance(basis: _Basis, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`Σ_ij (Q_Sᵀ G Q_A)_ij² v_ij`: the variance of what has the gradient `G = Σ gᵀ a` on the weights.

    Args:
        basis: of the weights.
        rows: pairs g `[T, d_out]`, a `[T, d_in (+ 1)]`.
    """
    total = torch.zeros_like(basis.variances)
    with float32_products():
        for g, a in rows:
            rotated = g if basis.q_out is None else g @ basis.q_out
            total.addmm_(rotated.T, a if basis.q_in is None else a @ basis.q_in)
    return (total.square_() * basis.variances).sum()


# ----------------------------------------------------------------------------------------------- posterior


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
    def _terms(head: Head, outer: Layer | None, rows: Sequence[Tensor], change: Mapping[str, Tensor]) -> list[_Term]:
        """The parts of one model's logits: a small change has a term of its own, which 16 bits do not round away."""
        terms = [_Term(x, head.weight, None if i else head.bias) for i, x in enumerate(rows)]
        if outer is not None and change:
            weight, bias = change[f"{outer.name}.weight"], change.get(f"{outer.name}.bias")
            device = rows[0].device
            terms.append(_Term(rows[0], weight.to(device), None if bias is None else bias.to(device)))
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
            vocabulary = _vocabulary(head, checked)
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
                        start = _add(mixture, start, terms, len(parts[0]), vocabulary, dtype)
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
            vocabulary = _vocabulary(head, checked)
            if max(listed, default=count - 1) >= vocabulary:
                raise ValueError(f"candidates is {candidates}; the vocabulary has {vocabulary} tokens")
            layers = trace(head, layers, checked[0])
            jacobians = _Jacobians(self, layers, dtype, device)
            capture = Capture(head, layers, jacobians)
            found = []
            with (progress or Progress()).stage("variance of logits", sum(b.tokens for b in checked)) as stage:
                for batch in checked:
                    with torch.set_grad_enabled(bool(layers)), capture.running(batch) as rows:
                        h = rows.detach()
                        require_finite(h, batch, "what enters the softmax")
                        term = _Term(h, head.weight, head.bias)
                        tokens, logits = _candidates(term, listed, count, vocabulary, dtype)
                        variance = torch.zeros_like(logits)
                        if layers:
                            for at, c, gradient in _one_each(rows, head.weight, tokens, batch):
                                jacobians.begin(batch.loss_index[at] // batch.input_ids.shape[1], len(batch.input_ids))
                                rows.backward(gradient, retain_graph=True)
                                capture.flush(batch)
                                variance[at, c] = jacobians.found()
                    if outer is not None:
                        variance += self._outer_variance(outer, h.to(dtype), tokens)
                    found.append((tokens.cpu(), logits.cpu(), variance.cpu()))
                    stage.advance(batch.tokens)
        return LogitVariance(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _basis(self, name: str, dtype: torch.dtype, device: torch.device) -> _Basis:
        state = self._states[name]
        q_out = q_in = None
        if state.q_out is not None:
            q_out, q_in = (q.to(device, dtype) for q in (state.output_eigenvectors(), state.input_eigenvectors()))
        spectrum = state.eigenvalues().to(device, dtype)
        return _Basis(q_out, q_in, 1 / (self.tokens * spectrum + self.prior_precision[name]))

    def _outer_variance(self, outer: Layer, h: Tensor, tokens: Tensor) -> Tensor:
        """What the output projection's weights give to the variance of logits `[n, C]`."""
        wide = torch.cat([h, h.new_ones(len(h), 1)], dim=1) if outer.has_bias else h
        return head_variance(self._basis(outer.name, h.dtype, h.device), wide, tokens)


class _Jacobians:
    """Takes the gradients of one logit a sequence, layer by layer, and adds up the variances that they give.

    Args:
        laplace: the posterior.
        layers: that give gradients.
        dtype: of the products.
        device: where the gradients are.
    """

    def __init__(self, laplace: Laplace, layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> None:
        self._bases = {layer.name: laplace._basis(layer.name, dtype, device) for layer in layers}
        self._dtype = dtype
        self._sequences: list[int] = []
        self._sums = torch.zeros(0, dtype=dtype, device=device)

    def begin(self, sequences: Tensor, number: int) -> None:
        """Expect gradients of some sequences of a batch of that many; those of the others are 0."""
        self._sequences = sequences.tolist()
        self._sums = self._sums.new_zeros(number)

    def found(self) -> Tensor:
        """The variances of the expected sequences."""
        return self._sums[self._sequences]

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        calls = [rows_of(pair, batch, self._dtype) for pair in pairs]
        if layer.has_bias:
            calls = [(g, torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2)) for g, a in calls]
        for n in self._sequences:
            self._sums[n] += gradient_variance(self._bases[layer.name], [(g[n], a[n]) for g, a in calls])


def _one_each(
    rows: Tensor, weight: Tensor | None, tokens: Tensor, batch: Batch
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Each candidate of each loss position once, a position of every sequence at a time.

    Yields which rows, which candidate, and the gradient of the sum of its logits there with respect to all rows.
    """
    sequence = batch.loss_index // batch.input_ids.shape[1]
    counts = torch.bincount(sequence, minlength=len(batch.input_ids))
    starts = counts.cumsum(0) - counts
    for turn in range(int(counts.max())):
        at = (starts + turn)[counts > turn]
        for c in range(tokens.shape[1]):
            gradient = torch.zeros_like(rows)
            if weight is None:
                gradient[at, tokens[at, c]] = 1
            else:
                gradient[at] = weight[tokens[at, c]].to(rows.dtype)
            yield at, c, gradient


def _vocabulary(head: Head, batches: Sequence[Batch]) -> int:
    """V; ValueError where a label is outside."""
    if head.weight is None:
        few = Batch(0, *(x[:1] for x in (batches[0].input_ids, batches[0].attention, batches[0].labels)))
        with torch.no_grad():
            size = head.rows(few).shape[1]
    else:
        size = head.weight.shape[0]
    for batch in batches:
        check_targets(batch, size)
    return size


def _chunks(terms: Sequence[_Term], rows: int, vocabulary: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Logits of a few rows at a time, at least float32."""
    step = rows_per_chunk(2 * vocabulary, 0, terms[0].rows.device)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        logits = terms[0].of(part, dtype)
        for term in terms[1:]:
            logits = logits + term.of(part, dtype)
        yield part, logits


def _add(mixture: Mixture, start: int, terms: Sequence[_Term], rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Add one model's logits of a batch, whose rows begin at `start`; returns where those of the next one do."""
    for part, logits in _chunks(terms, rows, vocabulary, dtype):
        mixture.add(slice(start + part.start, start + part.stop), logits)
    return start + rows


def _candidates(
    term: _Term, listed: Sequence[int], count: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The tokens that are asked about at each row, and their logits, `[n, C]`."""
    rows = len(term.rows)
    tokens = torch.tensor(listed or [0] * count, device=term.rows.device).expand(rows, count).clone()
    values = torch.empty(rows, count, dtype=dtype, device=term.rows.device)
    for part, logits in _chunks([term], rows, vocabulary, dtype):
        if not listed:
            tokens[part] = logits.topk(count, dim=1).indices
        values[part] = logits.gather(1, tokens[part])
    return tokens, values
