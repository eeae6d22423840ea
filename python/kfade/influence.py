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
from kfade_kernels import kron_solve
from kfade_kernels.precision import float32_products
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .capture import Pair, deterministic_mode, frozen, graph_from_embeddings, rows_of, trace
from .config import InfluenceConfig, to_dict
from .curvature import Curvature, LayerCurvature
from .errors import StorageError
from .fit import check_batches, device_of, fitted_layers, model_id, run_fisher, state_dtype
from .layers import Layer
from .loss import Batch, FiniteCheck, Head, sequence_groups
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


def solve_rows(state: LayerCurvature, rows: Sequence[tuple[Tensor, Tensor]], damping: float) -> list[Tensor]:
    """`(F + λI)⁻¹` applied to gradients that are given as factors.

    Args:
        state: of the layer.
        rows: for each gradient the pair `(g [N, d_out], a [N, d_in (+ 1)])`, which stands for `gᵀ a`. Where its rows
            are few they are rotated, and the gradient is not formed before the solve.
        damping: λ, absolute.

    Returns:
        The solutions, `[d_out, d_in (+ 1)]`.
    """
    device = rows[0][0].device
    if state.q_out is None:
        scale = state.eigenvalues().to(rows[0][0]) + damping
        with float32_products():
            return [(g.T @ a).div_(scale) for g, a in rows]
    q_out, q_in = state.output_eigenvectors().to(device), state.input_eigenvectors().to(device)
    eigenvalues: Tensor | tuple[Tensor, Tensor]
    if state.lambda_sum is None and state.lambda_out is not None and state.lambda_in is not None:
        eigenvalues = (state.lambda_out.to(device), state.lambda_in.to(device))
    else:
        eigenvalues = state.eigenvalues().to(device)
    number = len(rows)
    return kron_solve(list(rows), [q_out] * number, [q_in] * number, [eigenvalues] * number, damping)


def sequence_scores(weight: Tensor, bias: Tensor | None, g: Tensor, a: Tensor) -> Tensor:
    """`Σ_t g_ntᵀ D_q [a_nt, 1]` for all queries q and sequences n: `[Q, B]`.

    Args:
        weight: the weight part of the solved queries D, `[Q, d_out, d_in]`.
        bias: their bias part `[Q, d_out]`, or None.
        g: output gradients `[B, T, d_out]`, zero at padding.
        a: inputs `[B, T, d_in]`, zero at padding.

    No per-sequence gradient is kept. For one query D meets the tokens, `2·B·T·d_out·d_in` FLOPs a query; for more
    it is cheaper, `2·B·(T + Q)·d_out·d_in`, to form some rows of the gradients, use them for all queries, and
    drop them (`SLAB` elements).
    """
    (queries, d_out, d_in), (sequences, tokens, _) = weight.shape, a.shape
    with float32_products():
        scores = weight.new_zeros(queries, sequences) if bias is None else bias @ g.sum(1).T
        if queries * tokens <= queries + tokens:
            for q in range(queries):
                scores[q] += ((g @ weight[q]) * a).sum((1, 2))
            return scores
        rows = max(1, SLAB // (sequences * d_in))
        for start in range(0, d_out, rows):
            part = slice(start, start + rows)
            gradient = torch.bmm(g[:, :, part].mT, a)
            scores.addmm_(weight[:, part].flatten(1), gradient.flatten(1).T)
    return scores


class _Collector(ABC):
    """What both passes share: the place of a batch among the sequences, and the look for NaN."""

    def __init__(self, dtype: torch.dtype, device: torch.device, what: str) -> None:
        self.finite = FiniteCheck(device)
        self._dtype, self._what = dtype, what
        self._start = self._size = 0

    def _rows(self, layer: Layer, pairs: Sequence[Pair], batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
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
        weight, bias: by layer name, `[Q, d_out, d_in]` and `[Q, d_out]`.
    """

    def __init__(
        self, curvature: Curvature, number: int, config: InfluenceConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(dtype, device, "query's")
        self._curvature = curvature
        self._dampings = {n: state.damping(config.damping, config.damping_kind) for n, state in curvature.items()}
        self.weight: dict[str, Tensor] = {}
        self.bias: dict[str, Tensor] = {}
        for name, state in curvature.items():
            self.weight[name] = torch.zeros(number, state.d_out, state.d_in, dtype=dtype, device=device)
            if state.has_bias:
                self.bias[name] = torch.zeros(number, state.d_out, dtype=dtype, device=device)

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        calls = list(self._rows(layer, pairs, batch))
        # After the last loss position g is zero, and before it padding is.
        keep = batch.attention & (batch.loss_mask.flip(1).cumsum(1).flip(1) > 0)
        rows = []
        for n in range(len(keep)):
            g, a = (torch.cat([x[n][keep[n]] for x in side]) for side in zip(*calls, strict=True))
            rows.append((g, torch.cat([a, a.new_ones(len(a), 1)], dim=1) if layer.has_bias else a))
        state = self._curvature[layer.name]
        for n, solution in enumerate(solve_rows(state, rows, self._dampings[layer.name]), self._start):
            self.weight[layer.name][n] = solution[:, : layer.d_in]
            if layer.has_bias:
                self.bias[layer.name][n] = solution[:, layer.d_in]


class _Scores(_Collector):
    """Adds each layer's part to the scores of some queries.

    Attributes:
        scores: `[Q, N]`.
    """

    def __init__(self, queries: _Queries, number: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device, "training")
        self._queries = queries
        rows = len(next(iter(queries.weight.values())))
        self.scores = torch.zeros(rows, number, dtype=dtype, device=device)

    def __call__(self, layer: Layer, pairs: list[Pair], batch: Batch) -> None:
        weight, bias = self._queries.weight[layer.name], self._queries.bias.get(layer.name)
        for g, a in self._rows(layer, pairs, batch):
            self.scores[:, self._start : self._start + len(g)] += sequence_scores(weight, bias, g, a)


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
    with `2·(T + Q)·d_out·d_in` FLOPs a training sequence of T tokens and layer, Q the queries of the group.
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
    each = sum(state.d_out * state.width_in for state in curvature.values()) * dtype.itemsize
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
