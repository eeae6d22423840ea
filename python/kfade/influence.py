"""Influence functions: how much each training sequence moves the loss of each query.

The score of training sequence n for query q is

    score(q, n) = ∇L_qᵀ (F + λI)⁻¹ ∇L_n

with L the loss of a sequence *summed* over its loss positions, and F the fitted curvature, which is that of
the *token mean* (Koh and Liang 2017; with EK-FAC: Grosse et al. 2023, arXiv 2308.03296). A positive score says that
n helps q: training without n raises the loss of q, by `score / T` to first order, where T counts the loss
positions of the training set. kronfluence 1.0.1 divides Λ by the N fitted sequences in the place of the T fitted
positions, so with EK-FAC, or the diagonal, and relative damping its scores are these times `N / T`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kfade_kernels import kron_solve, low_rank
from kfade_kernels.kron_solve.pytorch import solve_rotated
from kfade_kernels.precision import float32_products
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .capture import Pair, deterministic_mode, frozen, graph_from_embeddings, rows_of, trace
from .config import InfluenceConfig, to_dict
from .curvature import Curvature, fitted_layers
from .errors import StorageError
from .fisher import run_fisher
from .layer_curvature import LayerCurvature
from .layers import Layer
from .loss import Batch, FiniteCheck, Head, check_batches, sequence_groups
from .models import device_of, model_id, state_dtype
from .operators import CurvatureOperator
from .progress import Progress, Stage
from .storage import read_json, sha256, write_tensors, write_text

FORMAT = "kfade-influence"
VERSION = 1
TENSORS, SUMMARY = "influence.safetensors", "influence.json"
CONVENTION = (
    "score = gradient of the query's summed loss, times (F + damping)^-1, times gradient of the training sequence's"
    " summed loss; F is of the token mean. Positive: training on the sequence lowers the query's loss."
)
# Elements of the training gradients that exist at a time: some rows of each sequence of a batch.
SLAB = 1 << 20
# Up to this side a whole singular value decomposition takes milliseconds.
EXACT_SIDE = 256
# Of the subspace of larger ones: the distance to the nearest matrix of the rank is then right to three digits.
ITERATIONS = 4
# g and a of some positions, or the two factors of a matrix.
Rows = tuple[Tensor, Tensor]


class Top(NamedTuple):
    """The most helpful training sequences of each query, best first, `[Q, k]`."""

    values: Tensor
    indices: Tensor


@dataclass
class Influence:
    """Scores of every query against every training sequence.

    Attributes:
        scores: `[Q, N]`, in the order in which the sequences were given; on the CPU.
        losses: T, the loss positions of the training set.
        config: how they were computed.
        model_id: name of the model.
    """

    scores: Tensor = field(repr=False)
    losses: int
    config: InfluenceConfig
    model_id: str = ""

    def top(self, k: int) -> Top:
        """The k training sequences with the largest scores for each query; all of them where there are fewer.

        Raises:
            TypeError, ValueError: `k` is not a whole number of at least 1.
        """
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k is {k!r}; it must be an integer")
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        found = self.scores.topk(min(k, self.scores.shape[1]), dim=1)
        return Top(found.values, found.indices)

    def removal(self) -> Tensor:
        """Predicted rise of each query's summed loss, in nats, if a training sequence were left out: `[Q, N]`."""
        return self.scores / self.losses

    def in_order(self, queries: Sequence[int], train: Sequence[int]) -> Influence:
        """The same scores with query i in row `queries[i]` and training sequence n in column `train[n]`.

        Both are permutations, such as `kfade.data.ordered_batches` gives.
        """
        scores = torch.empty_like(self.scores)
        scores[torch.tensor(queries).unsqueeze(1), torch.tensor(train)] = self.scores
        return replace(self, scores=scores)

    def summary(self, k: int = 10) -> dict[str, Any]:
        """How the scores were computed, and the top k a query, as plain JSON values."""
        top = self.top(k)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return {
            "model_id": self.model_id,
            "convention": CONVENTION,
            "config": to_dict(self.config),
            "losses": self.losses,
            "shape": list(self.scores.shape),
            "top": [[{"train": n, "score": x} for n, x in zip(*row, strict=True)] for row in rows],
        }

    def save(self, directory: str | Path, k: int = 10) -> None:
        """Write `influence.safetensors` (scores) and `influence.json` (how, and the top k a query) into a directory.

        Raises:
            TypeError, ValueError: as `top`.
        """
        directory, summary = Path(directory), self.summary(k)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SUMMARY).unlink(missing_ok=True)
        write_tensors(directory / TENSORS, {"scores": self.scores})
        head = {"format": FORMAT, "version": VERSION, "sha256": sha256(directory / TENSORS)}
        write_text(directory / SUMMARY, json.dumps({**head, **summary}, indent=1))

    @classmethod
    def load(cls, directory: str | Path) -> Influence:
        """Read what `save` wrote.

        Raises:
            StorageError: missing, incomplete, corrupt, or of a future version.
        """
        directory = Path(directory)
        summary = read_json(directory / SUMMARY)
        if summary.get("format") != FORMAT:
            raise StorageError(f"{directory} has format {summary.get('format')!r}; it must be {FORMAT!r}")
        if summary.get("version") != VERSION:
            raise StorageError(f"{directory} has version {summary.get('version')!r}; this kfade reads {VERSION}")
        path = directory / TENSORS
        try:
            if sha256(path) != summary["sha256"]:
                raise StorageError(f"{path} is corrupt: its SHA-256 is not that of {SUMMARY}")
            scores = load_file(path)["scores"]
            return cls(scores, summary["losses"], InfluenceConfig(**summary["config"]), summary["model_id"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{directory} cannot be read: {error}") from error


def to_rank(matrix: Tensor, rank: int) -> Rows:
    """The nearest matrix of some rank in the Frobenius norm, by the singular value decomposition.

    Of a matrix with more than `EXACT_SIDE` rows and columns, and of much more than the rank, it is found in a
    subspace: that of a random sketch with `max(16, rank)` directions to spare, after `ITERATIONS` products with the
    matrix and its transpose (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4). The seed is fixed.

    Args:
        matrix: `[d_out, d_in]`, float32 or float64.
        rank: k, at most the smaller side.

    Returns:
        Its factors `left [k, d_out]`, with orthonormal rows, and `right [k, d_in]`: it is `leftᵀ right`.

    Cost: `4·(ITERATIONS + 1)·d_out·d_in·(k + max(16, k))` FLOPs in the subspace.
    """
    columns = rank + max(16, rank)
    basis = None
    with float32_products():
        if min(matrix.shape) > max(EXACT_SIDE, 4 * columns):
            generator = torch.Generator().manual_seed(0)
            sketch = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
            basis = torch.linalg.qr(matrix @ sketch.to(matrix.device)).Q
            for _ in range(ITERATIONS):
                basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        u, s, v = torch.linalg.svd(matrix if basis is None else basis.T @ matrix, full_matrices=False)
        left = u[:, :rank] if basis is None else basis @ u[:, :rank]
    return left.T, s[:rank, None] * v[:rank]


def _eigen(state: LayerCurvature, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`Q_out`, `Q_in` and Λ on a device; of Λ = λ_out λ_inᵀ the two vectors, else Λ and None."""
    if state.lambda_sum is None and state.lambda_out is not None and not state.low_rank:
        values, values_in = state.lambda_out, state.lambda_in
    else:
        values, values_in = state.eigenvalues(), None
    return (
        state.output_eigenvectors().to(device), state.input_eigenvectors().to(device), values.to(device),
        None if values_in is None else values_in.to(device),
    )  # fmt: skip


def solve_rows(state: LayerCurvature, rows: Sequence[Rows], damping: float) -> list[Tensor]:
    """`(F + λI)⁻¹` applied to gradients that are given as factors.

    Args:
        state: of the layer.
        rows: for each gradient the pair `(g [N, d_out], a [N, d_in (+ 1)])`, which stands for `gᵀ a`. Where its rows
            are few they are rotated, and the gradient is not formed before the solve.
        damping: λ, absolute.

    Returns:
        The solutions, `[d_out, d_in (+ 1)]`.
    """
    if state.low_rank:
        device = rows[0][0].device
        q_out, q_in, values, _ = _eigen(state, device)
        scale = (values + damping).reciprocal_()
        with float32_products():
            gradients = [g.to(q_out.dtype).T @ a.to(q_out.dtype) for g, a in rows]
        return [low_rank.apply(gradient, q_out, q_in, scale) for gradient in gradients]
    if state.in_blocks and state.q_out is not None:
        with float32_products():
            gradients = [g.T @ a for g, a in rows]
        return [state.solve(gradient, damping) for gradient in gradients]
    if state.q_out is None:
        scale = state.eigenvalues().to(rows[0][0]) + damping
        with float32_products():
            return [(g.T @ a).div_(scale) for g, a in rows]
    q_out, q_in, values, values_in = _eigen(state, rows[0][0].device)
    eigenvalues = values if values_in is None else (values, values_in)
    number = len(rows)
    return kron_solve(list(rows), [q_out] * number, [q_in] * number, [eigenvalues] * number, damping)


def solve_rows_to_rank(state: LayerCurvature, rows: Sequence[Rows], damping: float, rank: int) -> Iterator[Rows]:
    """As `solve_rows`, each solution replaced by the nearest matrix of some rank: its factors, as of `to_rank`.

    A rotation moves no singular value, so it is found in the eigenbasis, and only its factors are rotated back:
    `2·k·(d_out² + d_in²)` FLOPs in the place of the `2·d_out·d_in·(d_out + d_in)` of a whole solution. Thin bases do
    not hold the whole solution, which is then formed; so it is where factors are in blocks.
    """
    if state.q_out is None or state.low_rank or state.in_blocks:
        yield from (to_rank(solution, rank) for solution in solve_rows(state, rows, damping))
        return
    q_out, q_in, values, values_in = _eigen(state, rows[0][0].device)
    for g, a in rows:
        with float32_products():
            left, right = to_rank(solve_rotated(g, a, q_out, q_in, values, values_in, damping), rank)
            left, right = left @ q_out.T, right @ q_in.T
        yield left, right


@dataclass
class Solved:
    """Solved gradients `D = (F + λI)⁻¹ ∇L` of Q queries for one layer, whole or of rank k.

    Attributes:
        weight: the weight part, `[Q, d_out, d_in]`; of rank k the right factors of it, `[Q, k, d_in]`.
        left: None, or of rank k the left factors `[Q, k, d_out]`: the weight part is `leftᵀ weight`.
        bias: the bias part `[Q, d_out]`, or None.
    """

    weight: Tensor
    left: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def zeros(
        cls, number: int, state: LayerCurvature, rank: int | None, dtype: torch.dtype, device: torch.device
    ) -> Solved:
        """Room for the gradients of some queries; `rank` as `rank_kept` gives it."""

        def room(*shape: int) -> Tensor:
            return torch.zeros(number, *shape, dtype=dtype, device=device)

        bias = room(state.d_out) if state.has_bias else None
        if rank is None:
            return cls(room(state.d_out, state.d_in), None, bias)
        return cls(room(rank, state.d_in), room(rank, state.d_out), bias)

    def put(self, n: int, matrix: Tensor, left: Tensor | None = None) -> None:
        """Keep the solution of query n: `matrix [d_out, d_in (+ 1)]`, or of rank k `leftᵀ matrix`."""
        d_in = self.weight.shape[2]
        self.weight[n] = matrix[:, :d_in]
        if left is not None and self.left is not None:
            self.left[n] = left
        if self.bias is not None:
            self.bias[n] = matrix[:, d_in] if left is None else matrix[:, d_in] @ left


def rank_kept(state: LayerCurvature, rank: int | None) -> int | None:
    """The rank that a layer's solved gradients are kept with: None, whole, where that takes no more numbers.

    The rule knows no batch, so scores do not depend on how sequences were batched.
    """
    return None if rank is None or rank * (state.d_out + state.d_in) >= state.d_out * state.d_in else rank


def numbers_kept(state: LayerCurvature, rank: int | None) -> int:
    """Numbers that one solved gradient of a layer takes; `rank` as `rank_kept` gives it."""
    sides = state.d_out * state.d_in if rank is None else rank * (state.d_out + state.d_in)
    return sides + state.d_out * state.has_bias


def sequence_scores(solved: Solved, g: Tensor, a: Tensor) -> Tensor:
    """`Σ_t g_ntᵀ D_q [a_nt, 1]` for all queries q and sequences n: `[Q, B]`.

    Args:
        solved: the solved queries D.
        g: output gradients `[B, T, d_out]`, zero at padding.
        a: inputs `[B, T, d_in]`, zero at padding.

    No per-sequence gradient is kept. For one query D meets the tokens, `2·B·T·d_out·d_in` FLOPs a query; for more
    it is cheaper, `2·B·(T + Q)·d_out·d_in`, to form some rows of the gradients, use them for all queries, and
    drop them (`SLAB` elements).

    Of rank k the factors meet the tokens, `2·B·T·Q·k·(d_out + d_in)` FLOPs. Where queries are so many that this is
    more, some rows of D are formed too, `2·Q·k·d_out·d_in`, and meet those of the gradients.
    """
    weight, left = solved.weight, solved.left
    (queries, inner, d_in), (sequences, tokens, d_out) = weight.shape, g.shape
    meeting = sequences * tokens * queries * (d_out * d_in if left is None else inner * (d_out + d_in))
    forming = d_out * d_in * (sequences * (tokens + queries) + (0 if left is None else queries * inner))
    with float32_products():
        scores = weight.new_zeros(queries, sequences) if solved.bias is None else solved.bias @ g.sum(1).T
        if meeting > forming:
            for part in _parts(d_out, SLAB // (d_in * (sequences if left is None else max(sequences, queries)))):
                gradient = torch.bmm(g[:, :, part].mT, a)
                of_queries = weight[:, part] if left is None else torch.bmm(left[:, :, part].mT, weight)
                scores.addmm_(of_queries.flatten(1), gradient.flatten(1).T)
        elif left is None:
            for q in range(queries):
                scores[q] += ((g @ weight[q]) * a).sum((1, 2))
        else:
            for part in _parts(queries, SLAB // (sequences * tokens * inner)):
                met = g.flatten(0, 1) @ left[part].flatten(0, 1).T
                met *= a.flatten(0, 1) @ weight[part].flatten(0, 1).T
                scores[part] += met.view(sequences, tokens, -1, inner).sum((1, 3)).T
    return scores


def _parts(number: int, size: int) -> Iterator[slice]:
    """`range(number)` as slices of some size, at least 1."""
    return (slice(start, start + max(1, size)) for start in range(0, number, max(1, size)))


class _Collector(ABC):
    """What both passes share: the place of a batch among the sequences, and the look for NaN."""

    def __init__(self, dtype: torch.dtype, device: torch.device, what: str) -> None:
        self.finite = FiniteCheck(device)
        self._dtype, self._what = dtype, what
        self._start = self._size = 0

    def _rows(self, layer: Layer, pairs: Sequence[Pair], batch: Batch) -> Iterator[Rows]:
        """g `[B, T, d_out]` and a `[B, T, d_in]` of each call, zero at padding."""
        self._size = len(batch.input_ids)
        for pair in pairs:
            g, a = rows_of(pair, batch, self._dtype)
            self.finite.see(g, batch, f"the {self._what} output gradient of {layer.name}")
            self.finite.see(a, batch, f"the {self._what} input of {layer.name}")
            yield g, a

    @abstractmethod
    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        """Take the pairs of one layer and batch."""

    def end_batch(self) -> None:
        """Go on to the next sequences.

        Raises:
            NonFiniteError: the batch holds a NaN or an infinity.
        """
        self.finite.raise_if_any()
        self._start += self._size

    def clear(self) -> None:
        """Forget all that waits."""
        self.finite.clear()


class _Queries(_Collector):
    """Solves for the gradients of some queries and keeps the solutions.

    Attributes:
        solved: by layer name.
    """

    def __init__(
        self, curvature: Curvature, number: int, config: InfluenceConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(dtype, device, "query's")
        self._curvature = curvature
        self._dampings = {n: state.damping(config.damping, config.damping_kind) for n, state in curvature.items()}
        self._ranks = {n: rank_kept(state, config.query_rank) for n, state in curvature.items()}
        self.solved = {n: Solved.zeros(number, state, self._ranks[n], dtype, device) for n, state in curvature.items()}

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        calls = list(self._rows(layer, pairs, batch))
        # After the last loss position g is zero, and before it padding is.
        keep = batch.attention & (batch.loss_mask.flip(1).cumsum(1).flip(1) > 0)
        rows = []
        for n in range(len(keep)):
            g, a = (torch.cat([x[n][keep[n]] for x in side]) for side in zip(*calls, strict=True))
            rows.append((g, torch.cat([a, a.new_ones(len(a), 1)], dim=1) if layer.has_bias else a))
        name, solved = layer.name, self.solved[layer.name]
        state, damping, rank = self._curvature[name], self._dampings[name], self._ranks[name]
        if rank is None:
            for n, solution in enumerate(solve_rows(state, rows, damping), self._start):
                solved.put(n, solution)
            return
        # A decomposition fails on NaN, and knows no batch to blame.
        self.finite.raise_if_any()
        for n, (left, right) in enumerate(solve_rows_to_rank(state, rows, damping, rank), self._start):
            solved.put(n, right, left)


class _Scores(_Collector):
    """Adds each layer's part to the scores of some queries.

    Attributes:
        scores: `[Q, N]`.
    """

    def __init__(self, queries: _Queries, number: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device, "training")
        self._solved = queries.solved
        rows = len(next(iter(self._solved.values())).weight)
        self.scores = torch.zeros(rows, number, dtype=dtype, device=device)

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        for g, a in self._rows(layer, pairs, batch):
            self.scores[:, self._start : self._start + len(g)] += sequence_scores(self._solved[layer.name], g, a)


def influence(
    model: nn.Module,
    curvature: Curvature,
    queries: Iterable[Mapping[str, Tensor]],
    train: Iterable[Mapping[str, Tensor]],
    config: InfluenceConfig | None = None,
    *,
    progress: Progress | None = None,
) -> Influence:
    """Scores of training sequences for queries; the module's docstring has formula and sign.

    Args:
        model: a causal language model, as `fit` takes it. It is left as it was.
        curvature: fitted on this model, best on the training set.
        queries: batches as `fit` takes them; each sequence is a query, and its labels say what loss is asked about.
        train: batches of the sequences to score, with the labels of training.
        config: options; see InfluenceConfig.
        progress: where to show progress and record costs.

    Returns:
        The scores `[Q, N]`, sequences in the order given, batch by batch.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: no batch, a query without a loss position, a curvature of other layers, or a damping of 0 where
            an eigenvalue is 0.
        UnsupportedLayerError, NonFiniteError: as `fit`.

    Cost: one backward pass a query, and for each group of queries that `solved_bytes` holds one over the training set,
    with `2·(T + Q)·d_out·d_in` FLOPs a training sequence of T tokens and layer, Q the queries of the group. With
    `query_rank` k it is at most `2·T·Q·k·(d_out + d_in)`, and the memory of a query `k·(d_out + d_in)` numbers.
    """
    config, progress = config or InfluenceConfig(), progress or Progress()
    for name, value, kind in (("curvature", curvature, Curvature), ("config", config, InfluenceConfig)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a {kind.__name__}")
    layers = fitted_layers(model, curvature)
    # For its check that the inverse exists.
    CurvatureOperator(curvature, damping=config.damping, kind=config.damping_kind).inverse()
    device, dtype = device_of(model), state_dtype(model)
    asked, trained = check_batches(queries, device, "queries"), check_batches(train, device, "train")
    without = torch.cat([~batch.loss_mask.any(1) for batch in asked]).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"queries {without[:8]} have no loss position; each query must have at least one label")
    number = sum(len(batch.input_ids) for batch in trained)
    each = sum(numbers_kept(s, rank_kept(s, config.query_rank)) for s in curvature.values()) * dtype.itemsize
    groups = list(sequence_groups(asked, max(1, config.solved_bytes // each)))
    tracked = {module for layer in layers for module in layer.modules}
    tokens = sum(batch.tokens for batch in trained)
    scores = []
    with deterministic_mode(model), frozen(model), graph_from_embeddings(model):
        head = Head(model, trained[0], tracked, curvature.config.autocast)
        layers = trace(head, layers, trained[0])

        def run(collector: _Collector, batches: Sequence[Batch], stage: Stage) -> None:
            labelled = replace(curvature.config, fisher="empirical", samples=1)
            run_fisher(head, layers, batches, labelled, collector, lambda batch, _: stage.advance(batch.tokens))

        for count, group in enumerate(groups, 1):
            suffix = f" {count}/{len(groups)}" if len(groups) > 1 else ""
            size = sum(len(batch.input_ids) for batch in group)
            solved = _Queries(curvature, size, config, dtype, device)
            with progress.stage(f"queries solved{suffix}", sum(batch.tokens for batch in group)) as stage:
                run(solved, group, stage)
            found = _Scores(solved, number, dtype, device)
            with progress.stage(f"scores{suffix}", tokens) as stage:
                run(found, trained, stage)
            scores.append(found.scores.cpu())
    losses = sum(int(batch.loss_mask.sum()) for batch in trained)
    return Influence(torch.cat(scores), losses, config, model_id(model))
