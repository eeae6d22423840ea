"""Costs against numbers worked out by hand, and predictions on every known device."""

from __future__ import annotations

import pytest
import torch
from kfade_kernels import cost
from kfade_kernels.configurations import Configuration
from kfade_kernels.cost import Cost, Part, predict
from kfade_kernels.devices import A100, DEVICES, H100, MI300X, Device

BF16, F32 = torch.bfloat16, torch.float32
SQUARE = Configuration(block_m=128, block_n=128, block_k=64, warps=8, stages=3)
EXACT = Configuration(block_m=128, block_n=128, block_k=32, warps=8, stages=3, precision="tf32x3")


def test_syrk_is_half_a_full_product() -> None:
    found = cost.syrk(16384, 4096, BF16, SQUARE)
    assert found.flops == 16384 * 4096**2 == found.effective_flops / 2
    # 32 block rows of 128; x in 2 bytes, and 528 packed blocks read and written in 4
    assert found.tiles == 32 * 33 // 2
    assert found.bytes == 2 * 16384 * 4096 + 8 * 528 * 128 * 128
    assert (found.launches, found.precision) == (1, "16-bit")


def test_waves_of_a_triangle() -> None:
    """Order 4,096 in tiles of 128 is 528 tiles: exactly four on each of 132 multiprocessors."""
    (part,) = cost.syrk(16384, 4096, BF16, SQUARE, H100).parts
    assert cost.waves(part, H100) == 4.0
    found = predict(cost.syrk(16384, 4096, BF16, SQUARE, H100), H100)
    assert (found.waves, found.quantisation, found.limit) == (4.0, 0.0, "arithmetic")
    # 528 tiles of 2·128·128·16384 FLOPs
    assert found.arithmetic_seconds == pytest.approx(528 * 2 * 128 * 128 * 16384 / (0.81 * 989e12))
    # one tile more makes a fifth round, in which 131 of 132 are idle
    one_more = Cost("syrk_", (Part("triangles", 1.0, 1.0, 0.0, "16-bit", 529, 1.0),))
    late = predict(one_more, H100)
    assert late.waves == pytest.approx(529 / 132)
    assert late.quantisation == pytest.approx(131 / 660)
    # two programs share a multiprocessor, and take twice as long for a tile
    shared = predict(Cost("syrk_", (Part("triangles", 1.0, 1.0, 0.0, "16-bit", 528, 1.0, programs=2),)), H100)
    assert shared.waves == 2.0
    assert shared.arithmetic_seconds == pytest.approx(528 / (0.81 * 989e12))


def test_few_tiles_are_split_and_summed() -> None:
    found = cost.syrk(16384, 512, BF16, SQUARE, H100)
    # 10 tiles for 132 programs: 10 parts each (13 save less than they move), written and read once more in float32
    assert found.parts[0].tiles == 100
    assert found.parts[1] == Part("ordered sum", 0.0, 0.0, 8.0 * 100 * 128 * 128)
    assert found.launches == 2
    alone = predict(cost.syrk(16384, 512, BF16, SQUARE), H100)
    assert predict(found, H100).arithmetic_seconds < 0.2 * alone.arithmetic_seconds


def test_a_sketch_is_two_skinny_products() -> None:
    found = cost.sketch(16384, 4096, 138, BF16, EXACT, H100)
    assert found.flops == 4 * 16384 * 4096 * 138
    # 32 × 2 tiles for 132 programs: 2 parts, each written and read once more, and y read and written
    assert [part.tiles for part in found.parts] == [128 * 2, 2 * 64, 0, 0]
    x, projected, state = 2 * 16384 * 4096, 4 * 16384 * 138, 4 * 4096 * 138
    assert found.bytes == 3 * x + 2 * projected + (1 + 2 + 4) * state
    assert cost.sketch(16384, 4096, 138, BF16, EXACT).parts[1].tiles == 64


def test_a_column_of_ones_is_read_not_multiplied() -> None:
    plain, ones = cost.syrk(100, 256, F32, EXACT), cost.syrk(100, 257, F32, EXACT, ones_column=True)
    assert ones.flops == plain.flops and ones.tiles == plain.tiles
    assert ones.parts[-1].bytes == 4 * 100 * 256


def test_grouping_fills_the_device() -> None:
    sizes = [(4096, 1024)] * 32
    together = cost.accumulate_factors(sizes, BF16, SQUARE, H100)
    assert together.tiles == 32 * 36
    assert together.flops == 32 * 4096 * 1024**2
    in_turn = 32 * predict(cost.syrk(4096, 1024, BF16, SQUARE), H100).seconds
    assert predict(together, H100).seconds < 0.6 * in_turn


def test_correction_by_tokens_and_by_gradients() -> None:
    found = cost.eigenvalue_correction(2, 64, 1536, 576, BF16, SQUARE)
    count = 2 * 64
    assert found.flops == 2 * count * (1536**2 + 576**2) + 2 * count * 1536 * 576
    assert [part.precision for part in found.parts] == ["pair", "pair", "16-bit"]
    # with 1,000 tokens the output side (other width 576) turns the gradient, the input side (1,536) its tokens
    long = cost.eigenvalue_correction(2, 1000, 1536, 576, F32, EXACT)
    assert long.flops == 2 * 2000 * 576**2 + 2 * 2000 * 1536 * 576 + 2 * 2 * 1536**2 * 576
    assert {part.precision for part in long.parts} == {"tf32x3"}
    assert long.parts[-1].tiles == 2 * 12 * 5
    # float16 rows meet float32 eigenvectors, and what is rotated is float32
    assert cost.eigenvalue_correction(2, 64, 1536, 576, torch.float16, EXACT).precision == "tf32x3"
    already = cost.eigenvalue_correction(2, 64, 1536, 576, BF16, SQUARE, rotated=True)
    assert already.flops == 2 * count * 1536 * 576
    assert already.bytes == 2 * count * (1536 + 576) + 8 * 1536 * 576


def test_solve() -> None:
    found = cost.kron_solve(300, 500, EXACT)
    assert found.flops == found.effective_flops == 4 * 300 * 500 * 800
    # four products each read and write 300 × 500, two read Q_out, two Q_in, one Λ
    assert found.bytes == 4 * (4 * 2 * 300 * 500 + 2 * 300**2 + 2 * 500**2 + 300 * 500)
    assert cost.kron_solve(300, 500, EXACT, batch=3).flops == 3 * found.flops
    assert cost.kron_solve(300, 500, EXACT, pair=True).bytes == found.bytes - 4 * (300 * 500 - 800)
    few = cost.kron_solve(300, 500, EXACT, tokens=20)
    assert few.flops == 2 * 20 * (300**2 + 500**2) + 2 * 20 * 300 * 500 + 2 * 300 * 500 * 800


def test_layers_solved_together() -> None:
    one, two = cost.kron_solve(256, 512, EXACT), cost.kron_solve(384, 128, EXACT)
    both = cost.together([one, two])
    assert (both.flops, both.bytes, both.tiles) == (one.flops + two.flops, one.bytes + two.bytes, one.tiles + two.tiles)
    assert both.launches == 4
    work = sum(part.tiles * part.tile_flops for part in both.parts)
    assert work == pytest.approx(sum(p.tiles * p.tile_flops for c in (one, two) for p in c.parts))


def test_cross_entropy_and_apply() -> None:
    logits = cost.sampled_cross_entropy(1000, 50_000, BF16)
    assert (logits.flops, logits.bytes) == (0, 2 * 2 * 1000 * 50_000)
    fused = cost.sampled_cross_entropy(1000, 50_000, BF16, hidden=512)
    assert fused.flops == 4 * 1000 * 512 * 50_000
    assert fused.bytes == 2 * 2 * (1000 + 50_000) * 512
    assert predict(logits, H100).limit == "memory"
    assert predict(logits, H100).memory_seconds == pytest.approx(2e8 / (0.81 * 3.35e12))
    assert cost.apply_update(1000, BF16, F32).bytes == 8000
    assert cost.apply_update(1000, BF16, F32, gradient_dtype=F32).bytes == 12_000


def test_eigh_and_the_model() -> None:
    found = cost.eigh(4096, F32, batch=2)
    assert found.flops == pytest.approx(2 * (4 / 3 + 2) * 4096**3)
    assert found.bytes == pytest.approx(2 * (4 * 4096**3 / 3 + 3 * 4 * 4096**2))
    assert cost.model_pass(10, 7).flops == 280
    assert cost.model_pass(10, 7, weight_gradients=True).flops == 420


def test_float32_grade_takes_several_products() -> None:
    assert cost.product_rate(H100, "tf32x3") == pytest.approx(495e12 / 3)
    assert cost.product_rate(H100, "bf16x6") == pytest.approx(989e12 / 6)
    assert cost.product_rate(H100, "pair") == pytest.approx(989e12 / 2)
    assert cost.product_rate(H100, "ieee") == 67e12
    assert cost.product_rate(MI300X, "ieee") == 163e12
    with pytest.raises(ValueError, match="precision is 'half'; it must be 16-bit, pair"):
        cost.product_rate(H100, "half")


def costs(size: int) -> list[Cost]:
    return [
        cost.syrk(size, size, BF16, SQUARE),
        cost.accumulate_factors([(size, size), (size, 2 * size)], F32, EXACT),
        cost.eigenvalue_correction(4, size, size, size, BF16, SQUARE),
        cost.kron_solve(size, size, EXACT),
        cost.sampled_cross_entropy(size, 8 * size, BF16),
        cost.sampled_cross_entropy(size, 8 * size, F32, hidden=size),
        cost.apply_update(size**2, BF16, F32),
        cost.eigh(size, F32),
        cost.model_pass(size**2, size),
    ]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_device_has_a_prediction_that_grows(device: Device) -> None:
    for smaller, larger in zip(costs(1024), costs(4096), strict=True):
        assert smaller.bytes < larger.bytes and smaller.flops <= larger.flops
        one, two = predict(smaller, device), predict(larger, device)
        assert 0 < one.seconds < two.seconds < 10
        parts = one.arithmetic_seconds + one.memory_seconds + one.launch_seconds
        assert max(one.arithmetic_seconds, one.memory_seconds) < one.seconds <= parts * (1 + 1e-12)
        assert 0 <= one.quantisation < 1


def test_a_faster_device_needs_less_time() -> None:
    for found in costs(4096):
        assert predict(found, H100).seconds < predict(found, A100).seconds
