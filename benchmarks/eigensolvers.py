"""Ways to an eigenbasis beside `torch.linalg.eigh`: from matrix products alone, and from an earlier basis.

    OMP_NUM_THREADS=1 python benchmarks/eigensolvers.py

All in float32 on one thread; times are CPU seconds of the process. Factors are drawn with steep, flat and clustered
spectra. `divide` is spectral divide and conquer: the polar factor of `A − σI` by QDWH (Nakatsukasa and Higham 2013,
with Cholesky factorisations) splits the space in two, and so on down to order 256. The others begin with the eigenbasis
of another factor, of other samples of the same distribution: `power` takes steps `Q ← qr(AQ)` as SOAP does,
`rotations` steps of all Jacobi angles at once, `Q ← qr(Q(I + K))`. What counts is time against what is left off the
diagonal, `‖offdiag(QᵀAQ)‖_F / ‖A‖_F`, and against the error that it makes in a solve. Λ of EK-FAC is exact in any
orthonormal basis, so that the solve is `Q_S [(Q_Sᵀ V Q_A) ⊘ (Λ + λ)] Q_Aᵀ` with
`Λ = diag(Q_Sᵀ S Q_S) diag(Q_Aᵀ A Q_A)ᵀ`; its distance is that from the solve in the true eigenbasis. FLOPs are counted
as they are done; on an H100 they are taken to run at the float32 rate of `kfade.rates`, beside the `eigh` of the same
table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from low_rank import SPECTRA, spectrum
from records import append
from torch import Tensor

from kfade.rates import TABLE

LEAF = 256
DAMPING = 0.1
# Over n³: LAPACK's eigh as usually counted; a QR that gives Q; a product.
EIGH, QR, PRODUCT = 9, 8 / 3, 2


def factors(kind: str, n: int, shared: float) -> tuple[Tensor, Tensor]:
    """Two sample covariances `[n, n]` of 4n rows each with this spectrum; of the rows they share a share."""
    generator = torch.Generator().manual_seed(n)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    root = q * spectrum(kind, n).sqrt().float()
    common, own = round(4 * n * shared), 4 * n - round(4 * n * shared)

    def rows(count: int) -> Tensor:
        x = torch.randn(count, n, generator=generator) @ root.T
        return x.T @ x / (4 * n)

    both = rows(common) if common else torch.zeros(n, n)
    return both + rows(own), both + rows(own)


# ---- divide and conquer


def polar(x: Tensor, flops: list[float]) -> Tensor:
    """The orthogonal factor of a symmetric matrix, by QDWH with Cholesky factorisations."""
    n = len(x)
    x = x / torch.linalg.norm(x)  # at least its largest singular value
    low, eye = 1e-6, torch.eye(n)
    for _ in range(12):
        # The weights of Nakatsukasa, Bai and Gygi 2010, for singular values in [low, 1].
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        z = eye + c * (x @ x)
        factor = torch.linalg.cholesky((z + z.T) / 2)
        solved = torch.cholesky_solve(x, factor)
        new = b / c * x + (a - b / c) * (solved + solved.T) / 2
        flops[0] += (PRODUCT + 1 / 3 + 2) * n**3
        low = min(1.0, low * (a + b * low**2) / (1 + c * low**2))
        change, x = float(torch.linalg.norm(new - x)), new
        if change < 1e-4 * math.sqrt(n) or 1 - low < 1e-7:
            break
    return x


def divide(a: Tensor, flops: list[float]) -> Tensor:
    """Eigenvectors in columns, ascending."""
    n = len(a)
    if n <= LEAF:
        flops[0] += EIGH * n**3
        return torch.linalg.eigh(a).eigenvectors
    middle = float(a.diagonal().median())
    projector = (torch.eye(n) + polar(a - middle * torch.eye(n), flops)) / 2
    upper = round(float(projector.trace()))
    if not 0 < upper < n:  # all eigenvalues on one side, by rounding
        flops[0] += EIGH * n**3
        return torch.linalg.eigh(a).eigenvectors
    # A basis of the range of the projector and, from the whole QR, of what is orthogonal to it.
    generator = torch.Generator().manual_seed(0)
    range_of = projector @ torch.randn(n, upper, generator=generator)
    q = torch.linalg.qr(projector @ torch.linalg.qr(range_of).Q, mode="complete").Q
    flops[0] += 2 * PRODUCT * n**2 * upper + 2 * QR * n**3
    parts = []
    for side in (q[:, upper:], q[:, :upper]):
        inner = side.T @ (a @ side)
        parts.append(side @ divide((inner + inner.T) / 2, flops))
        flops[0] += PRODUCT * n**2 * side.shape[1] + 2 * PRODUCT * n * side.shape[1] ** 2
    return torch.cat(parts, dim=1)


# ---- from an earlier basis


def power(a: Tensor, q: Tensor, steps: int, flops: list[float]) -> Tensor:
    q = q.flip(1)  # largest first, since QR keeps the directions of the first columns
    for _ in range(steps):
        q = torch.linalg.qr(a @ q).Q
        flops[0] += (PRODUCT + QR) * len(a) ** 3
    return q.flip(1)


def rotations(a: Tensor, q: Tensor, steps: int, flops: list[float]) -> Tensor:
    eye = torch.eye(len(a))
    for _ in range(steps):
        s = q.T @ a @ q
        values = s.diagonal()
        # The angle of each pair alone; together they overshoot, so the norm of all is held below 1.
        apart = values.unsqueeze(0) - values.unsqueeze(1)
        sign = torch.where(apart < 0, -1.0, 1.0)
        angles = (0.5 * torch.atan2(2 * s * sign, apart.abs())).fill_diagonal_(0)
        angles = (angles - angles.T) / 2
        x = torch.ones(len(a)) / math.sqrt(len(a))
        for _ in range(8):
            x = angles @ x
            size = float(torch.linalg.norm(x))
            x = x / max(size, 1e-30)
        q = torch.linalg.qr(q @ (eye + angles * min(1.0, 1 / max(size, 1e-30)))).Q
        flops[0] += (3 * PRODUCT + QR) * len(a) ** 3
    return q


# ---- measures


def residual(a: Tensor, q: Tensor) -> float:
    s = q.T @ a @ q
    return float(torch.linalg.norm(s - s.diagonal().diag()) / torch.linalg.norm(a))


def orthogonality(q: Tensor) -> float:
    return float(torch.linalg.matrix_norm(q.T @ q - torch.eye(len(q))) / math.sqrt(len(q)))


def solve(a: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """EK-FAC's solve for `a ⊗ a` in the basis q on both sides; Λ exact in it."""
    values = (q * (a @ q)).sum(0).clamp(min=0)
    spectrum_of = torch.outer(values, values)
    return q @ ((q.T @ v @ q) / (spectrum_of + DAMPING * spectrum_of.mean())) @ q.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--spectra", nargs="+", default=list(SPECTRA))
    parser.add_argument("--shared", type=float, default=0.9, help="share of rows that the earlier factor has too")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    h100 = TABLE["H100"]
    for n in options.orders:
        for kind in options.spectra if n < 4096 else options.spectra[:1]:
            a, earlier = factors(kind, n, options.shared)
            start = torch.linalg.eigh(earlier).eigenvectors
            values, vectors = torch.linalg.eigh(a)
            root = vectors * values.clamp(min=0).sqrt()
            v = root @ torch.randn(n, n, generator=torch.Generator().manual_seed(1)) @ root.T
            ways: dict[str, Callable[[list[float]], Tensor]] = {
                "eigh": lambda flops, a=a: torch.linalg.eigh(a).eigenvectors,  # type: ignore[misc]
                "divide": lambda flops, a=a: divide(a, flops),  # type: ignore[misc]
                "the earlier basis": lambda flops, q=start: q,  # type: ignore[misc]
            }
            for steps in (1, 4):
                ways[f"power {steps}"] = lambda flops, a=a, q=start, s=steps: power(a, q, s, flops)  # type: ignore[misc]
                ways[f"rotations {steps}"] = lambda flops, a=a, q=start, s=steps: rotations(a, q, s, flops)  # type: ignore[misc]
            truth, base = None, math.nan
            for name, way in ways.items():
                seconds, flops = math.inf, [0.0]
                for _ in range(3 if n < 1000 else 1 if n > 2000 else 2):
                    flops = [0.0]
                    begin = time.process_time()
                    q = way(flops)
                    seconds = min(seconds, time.process_time() - begin)
                solved = solve(a, q, v)
                if truth is None:
                    truth, base, flops = solved, seconds, [float(EIGH * n**3)]
                away = float(torch.linalg.norm(solved - truth) / torch.linalg.norm(truth))
                there = h100.eigh(n, torch.float32) if name == "eigh" else flops[0] / h100.single
                row: dict[str, Any] = {
                    "order": n, "spectrum": kind, "way": name, "gflop": f"{flops[0] / 1e9:.1f}",
                    "cpu_seconds": f"{seconds:.3f}", "over_eigh": f"{seconds / base:.2f}",
                    "off_diagonal": f"{residual(a, q):.2e}", "orthogonality": f"{orthogonality(q):.1e}",
                    "solve_distance": f"{away:.2e}", "h100_seconds_predicted": f"{there:.4f}",
                }  # fmt: skip
                print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                if not options.no_record:
                    append("eigensolvers", [row])


if __name__ == "__main__":
    main()
