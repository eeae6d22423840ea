"""The emulation of products on matrix units: what it rounds, and the size of its errors."""

from __future__ import annotations

import pytest
import torch
from precision import (
    accumulated,
    bf16_parts,
    multiply,
    outer_product,
    relative,
    rotation,
    round_tf32,
    steep_rows,
    truncate_tf32,
)


def test_tf32_has_eleven_significant_bits() -> None:
    x = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 3.0, 0.0])
    assert round_tf32(x).tolist() == [1 + 2.0**-10, -1 - 2.0**-10, 1.0, 3.0, 0.0]
    assert truncate_tf32(x).tolist() == [1.0, -1.0, 1.0, 3.0, 0.0]


def test_three_bf16_parts_are_all_of_a_float32() -> None:
    x = torch.randn(1000)
    high, middle, low = bf16_parts(x, 3)
    assert torch.equal(high.double() + middle.double() + low.double(), x.double())


def test_errors_of_an_outer_product() -> None:
    found = {(one.mode, one.measure): one.value for one in outer_product("", torch.randn(512, 96))}
    error = {mode: value for (mode, measure), value in found.items() if measure == "relative error"}
    assert 5e-5 < error["tf32, rounded"] < 4e-4
    # Cut operands make every square too small, and that does not average out.
    assert 5e-4 < error["tf32"] < 1e-3
    assert -1e-3 < found["tf32", "bias of the trace"] < -5e-4
    assert 1e-6 < error["bf16x3"] < 1e-5
    assert error["tf32x3"] <= 4 * error["float32"]
    assert error["bf16x6"] <= 4 * error["float32"]
    assert 1e-7 < error["right as a bf16 pair"] < 5e-6 < 2e-4 < error["right in bf16"]


def test_small_directions_need_more_than_tf32() -> None:
    x, q = steep_rows(512, 128)
    error = {one.mode: one.value for one in rotation("", x, q)}
    assert error["right in bf16"] > 1 and error["tf32"] > 0.1
    assert error["right as a bf16 pair"] < 1e-2 and error["right as a bf16 pair, result in bf16"] < 1e-2
    assert error["tf32x3"] <= 4 * error["float32"]
    assert error["bf16x6"] <= 4 * error["float32"]


@pytest.mark.parametrize("mode", ["tf32", "tf32x3", "bf16x3", "bf16x6"])
def test_what_a_mode_can_hold_is_exact(mode: str) -> None:
    a, b = torch.randint(-8, 8, (5, 40)).float(), torch.randint(-8, 8, (40, 7)).float()
    assert relative(multiply(mode, a, b), a.double() @ b.double()) == 0.0


def test_flushing_keeps_what_a_truncating_accumulator_loses() -> None:
    blocks = torch.rand(8000, 8, dtype=torch.float64)
    truth = blocks.sum(0)

    def bias(flush: int, truncate: bool) -> float:
        return float((accumulated(blocks, flush, truncate=truncate).double() / truth - 1).mean())

    assert -1e-3 < bias(8000, True) < -1e-5
    # 300 does not divide 8000.
    assert 10 * abs(bias(300, True)) < abs(bias(8000, True))
    assert abs(bias(8000, False)) < 1e-6
