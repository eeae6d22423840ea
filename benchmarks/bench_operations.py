"""Each operation beside the plain PyTorch expressions that it replaces: `make bench ARGS="-k syrk"`.

The cases are those of `kfade bench`. On a GPU the large ones run too, with a cold cache before each call.
"""

from __future__ import annotations

import pytest
import torch
from kfade_kernels.timing import Timer
from pytest_benchmark.fixture import BenchmarkFixture

from kfade.bench import CASES, OURS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNS = [("cpu", "small"), ("cpu", "medium"), ("cuda", "medium"), ("cuda", "large")]
GRID = [
    pytest.param(operation, number, sizes, dtype, device, id=f"{operation}-{sizes}{number}-{dtype}-{device}")
    for operation, case in CASES.items()
    for device, sizes in RUNS
    for number in range(len(getattr(case, sizes)))
    for dtype in DTYPES
]


@pytest.mark.parametrize(("operation", "number", "sizes", "dtype", "device"), GRID)
@pytest.mark.parametrize("provider", range(4))
def test_operation(
    benchmark: BenchmarkFixture, operation: str, number: int, sizes: str, dtype: str, device: str, provider: int
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    torch.manual_seed(0)
    case = CASES[operation]
    problem = case.make(**getattr(case, sizes)[number], dtype=DTYPES[dtype], device=torch.device(device))
    providers = {OURS: problem.run, **problem.baselines}
    if device == "cuda" and problem.baselines:
        name, plain = next(iter(problem.baselines.items()))
        providers[f"{name}, torch.compile"] = torch.compile(plain, mode="max-autotune-no-cudagraphs")
    if provider >= len(providers):
        pytest.skip("the operation has fewer providers")
    name, work = list(providers.items())[provider]
    benchmark.group = f"{operation} {problem.size} {dtype} {device}"
    benchmark.name = name
    if device == "cpu":
        benchmark.pedantic(work, rounds=5, iterations=1, warmup_rounds=2)
        return
    timer = Timer(problem.device)
    # The clock of pytest-benchmark reads what the events of each call measured.
    benchmark.extra_info["seconds"] = [timer(work) for _ in range(20)]
    benchmark.pedantic(lambda: (work(), torch.cuda.synchronize()), rounds=5, iterations=1, warmup_rounds=2)
