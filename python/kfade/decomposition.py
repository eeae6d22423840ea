"""Second stage: eigenvectors and eigenvalues of the factors, on a CPU as many at once as there are threads.

LAPACK gains little from a second thread, and loses much where another process has that core, but PyTorch lets go of
the interpreter while LAPACK works. So each factor is decomposed by one thread, largest first, and has the same bits
whatever is decomposed beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

import torch
from kfade_kernels import PackedSymmetric, low_rank
from kfade_kernels.blocks import BlockBasis, PackedBlocks
from kfade_kernels.precision import float32_products
from torch import Tensor

from .errors import NonFiniteError
from .layer_curvature import Basis, Factor, LayerCurvature, Sketch
from .placement import Placement

# Residual ‖(AQ − QΛ)z‖ / ‖A‖‖z‖ and ‖(QᵀQ − I)z‖ / ‖z‖ of random z, in units of the dtype's rounding, beyond
# which float32 is retried.
ROUNDINGS = 1_000.0
PROBES = 8
# From this order on, factors of a CPU are decomposed one after the other by all threads: as many at once as there are
# threads would take too much memory.
ALONE = 8192


def _is_accurate(a: Tensor, values: Tensor, vectors: Tensor) -> bool:
    """Whether `A Q = Q Λ` and `QᵀQ = I` on a few random vectors: O(n²), where full products cost half an eigh."""
    if not bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
        return False
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(a.shape[0], PROBES, generator=generator, dtype=torch.float64).to(a)
    # By TF32 products every decomposition would look bad.
    with float32_products():
        rotated = vectors @ probes
        residual = torch.linalg.norm(a @ rotated - vectors @ (values.unsqueeze(1) * probes))
        skew = torch.linalg.norm(vectors.T @ rotated - probes)
    limit = ROUNDINGS * torch.finfo(a.dtype).eps * float(torch.linalg.norm(probes))
    return float(residual) <= limit * (float(torch.linalg.norm(a)) or 1.0) and float(skew) <= limit


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Within this block operations that are called from this thread take so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decompose(total: PackedSymmetric, count: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[n]`, ascending and clamped at 0, and eigenvectors `[n, n]` in columns of `total / count`.

    `eigh` in the dtype of the factor; on failure, or on a residual beyond `ROUNDINGS`, in float64.

    Raises:
        RuntimeError: float64 failed as well.
        NonFiniteError: the factor holds a NaN or an infinity.
    """
    dense = total.to_dense().div_(max(1, count))
    if not bool(torch.isfinite(dense).all()):
        raise NonFiniteError(f"a factor of order {total.n} has a NaN or infinite entry: its sum overflowed")
    with _threads(torch.get_num_threads() if total.n >= ALONE else 1):
        return _eigh(dense)


def _eigh(dense: Tensor) -> tuple[Tensor, Tensor]:
    try:
        values, vectors = torch.linalg.eigh(dense)
        if _is_accurate(dense, values, vectors):
            # By rows, as they are saved: a loaded curvature then gives the same bits.
            return values.clamp_(min=0), vectors.contiguous()
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(dense.double())
    except torch.linalg.LinAlgError as error:
        raise RuntimeError(f"eigh of a factor of order {len(dense)} failed in float64 too: {error}") from error
    return values.clamp_(min=0).to(dense.dtype), vectors.to(dense.dtype).contiguous()


def decompose_blocks(total: PackedBlocks, count: float) -> tuple[Tensor, BlockBasis]:
    """The same of a factor in blocks, one after the other: eigenvalues `[n]`, ascending within each, and eigenvectors.

    Raises:
        RuntimeError, NonFiniteError: as `decompose`, of a block.
    """
    values, vectors = zip(*(decompose(block, count) for block in total.blocks), strict=True)
    return torch.cat(values), BlockBasis.of(vectors)


def decompose_sketch(sketch: Sketch, count: float, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenpairs of `total / count`, of which there is a sketch.

    Returns:
        Eigenvalues `[k + 1]`, ascending, and last the mean of the others; and eigenvectors `[n, k]` in columns.

    Raises:
        NonFiniteError: the sketch holds a NaN or an infinity.
    """
    if not bool(torch.isfinite(sketch.y).all() and torch.isfinite(sketch.trace)):
        raise NonFiniteError(f"a factor of order {sketch.y.shape[0]} has a NaN or infinite entry: its sum overflowed")
    with _threads(1):
        values, vectors = low_rank.nystrom(sketch.y, sketch.omega, float(sketch.trace), rank)
    return values / max(1, count), vectors


@dataclass(frozen=True)
class Job:
    """A factor that is to be decomposed.

    Attributes:
        cost: of it, by which jobs are ordered: `n³`, summed over blocks, or `n·l²` of a sketch `[n, l]`.
        alone: nothing runs beside it.
        work: decomposes it, on any thread.
        take: is given the result, on the thread that runs the jobs.
    """

    cost: float
    alone: bool
    work: Callable[[], tuple[Tensor, Basis]]
    take: Callable[[tuple[Tensor, Basis]], None]


def run(jobs: Sequence[Job]) -> None:
    """Run jobs, dearest first, as many at once as PyTorch has threads.

    The first error ends it, once what is in hand has been taken.
    """
    threads = torch.get_num_threads()
    jobs = sorted(jobs, key=lambda job: -job.cost)
    # A setting of the process: no job may find it otherwise than the others.
    with float32_products():
        for job in (job for job in jobs if job.alone or threads == 1):
            job.take(job.work())
        if threads > 1:
            try:
                _run_together((job for job in jobs if not job.alone), threads)
            finally:
                torch.set_num_threads(threads)  # what threads of later begin with


def _run_together(jobs: Iterator[Job], threads: int) -> None:
    failed: BaseException | None = None
    running: dict[Future[tuple[Tensor, Basis]], Job] = {}
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while failed is None or running:
            if failed is None:
                running |= {pool.submit(job.work): job for job in islice(jobs, threads - len(running))}
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                error = _take(running.pop(future), future)
                failed = failed or error
    raise failed


def _take(job: Job, future: Future[tuple[Tensor, Basis]]) -> BaseException | None:
    """What went wrong, if anything did."""
    try:
        job.take(future.result())
    except BaseException as error:
        return error
    return None


@dataclass(frozen=True)
class _Side:
    """Names of what a state has of one of its factors, and the stage that decomposes it."""

    total: str
    sketch: str
    count: str
    values: str
    vectors: str
    stage: str


INPUT = _Side("a_sum", "a_sketch", "positions", "lambda_in", "q_in", "input_decomposition")
OUTPUT = _Side("s_sum", "s_sketch", "losses", "lambda_out", "q_out", "decomposition")


def decompose_states(
    states: Mapping[str, LayerCurvature],
    done: Callable[[str, str], None] = lambda name, stage: None,
    rank: int | None = None,
    placement: Placement | None = None,
) -> None:
    """Eigenvectors and eigenvalues of the factors of states, where they have a factor and no eigenvectors yet.

    On a CPU as many factors are decomposed at once as PyTorch has threads, the largest first. `done(name, stage)` is
    called after each, with the stage that it is of its layer. Sketches, of which `rank` eigenpairs are taken, are freed
    on the way. Factors that live elsewhere, by `placement`, come to its device one by one, and eigenvectors go there.
    """

    def job(state: LayerCurvature, side: _Side) -> Job:
        def work() -> tuple[Tensor, Basis]:
            total, sketch, count = (getattr(state, name) for name in (side.total, side.sketch, side.count))
            if placement is not None:
                total = placement.fetch(total)
                sketch = sketch and replace(sketch, y=placement.fetch(sketch.y))
            if isinstance(total, PackedBlocks):
                return decompose_blocks(total, count)
            if sketch is None:
                return decompose(total, count)
            assert rank is not None
            return decompose_sketch(sketch, count, rank)

        def take(pair: tuple[Tensor, Basis]) -> None:
            for name, value in zip((side.values, side.vectors), pair, strict=True):
                setattr(state, name, value if placement is None else placement.keep(value))
            setattr(state, side.sketch, None)
            done(state.name, side.stage)

        total, sketch = getattr(state, side.total), getattr(state, side.sketch)
        device = (total or sketch.y).device if placement is None else placement.device
        return Job(*_cost(total, sketch, device), work, take)

    leading = [state for state in states.values() if state.group == state.name]
    run(
        [
            job(state, side)
            for side, candidates in ((INPUT, leading), (OUTPUT, states.values()))
            for state in candidates
            if getattr(state, side.vectors) is None and (getattr(state, side.total) or getattr(state, side.sketch))
        ]
    )
    for state in states.values():
        leader = states[state.group]
        state.lambda_in, state.q_in = leader.lambda_in, leader.q_in
        # One that a fit read again, though its eigenvectors were there.
        state.a_sketch = state.s_sketch = None


def _cost(total: Factor | None, sketch: Sketch | None, device: torch.device) -> tuple[float, bool]:
    """What decomposing on a device takes, and whether nothing may run beside it: see Job."""
    if sketch is not None:
        order, columns = sketch.y.shape
        return float(order * columns**2), device.type != "cpu"
    assert total is not None
    orders = [block.n for block in total.blocks]
    return float(sum(n**3 for n in orders)), max(orders) >= ALONE or device.type != "cpu"
