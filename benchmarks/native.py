"""The kernels in C++ beside PyTorch: our own `pytorch` backend, and the plain expressions, taking turns.

    python benchmarks/native.py                        # about ten minutes
    python benchmarks/native.py --only syrk_ --threads 2 --isa avx2 --no-record

Each figure is the least of a few calls. With one thread it is CPU time, which a machine that does other things too
changes least; with more it is wall time, since threads that wait for work spin. Where they do not
(`OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0`) it is the CPU time of all threads, which shows what sharing adds.

`pytorch` is the backend that serves where the module is not built. `rounded to bfloat16` is PyTorch's product of
16-bit rows as they are, which rounds each result (0.2 % relative); it is shown beside the others, and not counted as
plain. The plain squares of bfloat16 rows round as well.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kfade_kernels import cpu_support, problems
from kfade_kernels.problems import Problem, backends
from records import append

CPU = torch.device("cpu")
OUTER = [(1024, 576), (2048, 1536), (1024, 4096), (512, 8192)]
# Sequences, tokens, d_out, d_in.
SQUARES = [
    (8, 64, 1536, 576),
    (8, 128, 1536, 576),
    (2, 512, 1536, 576),
    (4, 64, 4096, 4096),
    (2, 512, 4096, 4096),
    (1, 2048, 1536, 4096),
]


def cases(only: str, dtypes: list[str]) -> Iterator[tuple[Problem, float]]:
    """Problems, and the billions of FLOPs that each of them needs."""
    for dtype in (getattr(torch, name) for name in dtypes):
        for rows, order in OUTER if only in ("", "syrk_") else []:
            yield problems.outer_product(rows, order, dtype, CPU), rows * order**2 * 1e-9
        if dtype == torch.float16 or only not in ("", "eigenvalue_correction_"):
            continue
        for sequences, tokens, d_out, d_in in SQUARES:
            flops = 2e-9 * sequences * tokens * d_out * d_in
            yield problems.correction(sequences, tokens, d_out, d_in, dtype, CPU, rotated=True), flops
        sequences, tokens, d_out, d_in = SQUARES[1]
        flops = 2e-9 * sequences * tokens * (d_out * d_in + d_out**2 + d_in**2)
        yield problems.correction(sequences, tokens, d_out, d_in, dtype, CPU), flops


def rounded(problem: Problem) -> dict[str, Callable[[], object]]:
    """The product of bfloat16 rows whose result is bfloat16 too."""
    if problem.operation != "syrk_" or problem.dtype != torch.bfloat16:
        return {}
    rows = next(rows for rows, order in OUTER if order == problem.extent)
    x, dense = torch.randn(rows, problem.extent).bfloat16(), torch.zeros(problem.extent, problem.extent)
    return {"rounded to bfloat16": lambda: dense.add_(x.T @ x)}


def switched(work: Callable[[], object], isa: str) -> Callable[[], object]:
    """The call by the kernels of an instruction set, or, without one, by PyTorch."""

    def call() -> object:
        if not isa:
            with backends(disable="cpu"):
                return work()
        with backends(enable="cpu"):
            os.environ[cpu_support.ISA] = isa
            return work()

    return call


def least(providers: dict[str, Callable[[], object]], clock: Callable[[], float], repeats: int) -> dict[str, float]:
    found = dict.fromkeys(providers, float("inf"))
    for _ in range(repeats + 1):  # the first is never the least
        for name, work in providers.items():
            begin = clock()
            work()
            found[name] = min(found[name], clock() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="syrk_ or eigenvalue_correction_")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", nargs="+", default=list(cpu_support._supported()))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        in_cpu_time = threads == 1 or os.environ.get("OMP_WAIT_POLICY") == "passive"
        clock = time.process_time if in_cpu_time else time.perf_counter
        for problem, gigaflops in cases(options.only, options.dtype):
            providers = {"pytorch": switched(problem.run, ""), **problem.baselines, **rounded(problem)}
            # A lower instruction set is of interest once: it is the same code.
            isas = options.isa if threads == options.threads[0] else options.isa[-1:]
            providers |= {f"cpu, {isa}": switched(problem.run, isa) for isa in isas}
            seconds = least(providers, clock, options.repeats)
            plain = min(seconds[name] for name in problem.baselines)
            rows: list[dict[str, Any]] = [
                {
                    "operation": problem.operation, "size": problem.size, "dtype": str(problem.dtype)[6:],
                    "threads": threads, "clock": "CPU" if in_cpu_time else "wall", "provider": name,
                    "ms": round(1e3 * value, 3), "needed_gflops": round(gigaflops / value, 1),
                    "times_pytorch_backend": round(seconds["pytorch"] / value, 2),
                    "times_plain": round(plain / value, 2),
                }
                for name, value in seconds.items()
            ]  # fmt: skip
            for row in rows:
                print(*row.values(), sep="\t", flush=True)
            if not options.no_record:
                append("native", rows, packages=("torch",))


if __name__ == "__main__":
    main()
