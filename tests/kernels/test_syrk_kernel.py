"""The kernels of the outer products in Triton's interpreter, in every form that a configuration can give them."""

from __future__ import annotations

from dataclasses import replace

import kfade_kernels as kk
import pytest
import torch
from oracles import assert_as_accurate, outer_sum

pytest.importorskip("triton")

from kfade_kernels import devices, triton_support
from kfade_kernels.configurations import Configuration
from kfade_kernels.packed import PackedSymmetric
from kfade_kernels.syrk import triton as syrk
from torch import Tensor

SMALL = Configuration(block_m=32, block_n=32, block_k=16, group=2)
FORMS = {
    "square tiles": SMALL,
    "wide tiles": replace(SMALL, block_n=64),
    "four tiles a square": replace(SMALL, block_n=128),
    "whole panels": replace(SMALL, block_m=128, block_n=128, group=8),
    "no grouping": replace(SMALL, group=1),
    "flushed every 32 rows": replace(SMALL, flush=32),
    "flushed every step": replace(SMALL, block_n=64, flush=1),
    "descriptors": replace(SMALL, block_n=64, descriptors=True, flush=32),
}


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    """A configuration that every call gets; descriptors as if the interpreter had the hardware."""
    c = FORMS[request.param]
    monkeypatch.setattr(syrk, "choose", lambda *_: c)
    monkeypatch.setattr(syrk, "has_descriptors", lambda _: True)
    # Unaligned rows take a tile of their own; here they take this one too.
    monkeypatch.setattr(syrk, "ANY_ROWS", replace(c, descriptors=False))
    return c


def added(x: Tensor, mask: Tensor | None = None, alpha: float = 1.0, *, ones: bool = False) -> Tensor:
    """What the kernels add to zero, with the scratch above the diagonal poisoned."""
    order = x.shape[1] + ones
    acc = PackedSymmetric.from_dense(
        torch.zeros(order, order).masked_fill(torch.ones(order, order).triu(1) > 0, torch.nan)
    )
    syrk.add_outer_products([syrk.problem(acc.data, order, x, mask, ones)], alpha, False)
    return acc.to_dense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (70, 160), (33, 129)])
def test_every_form_agrees_with_float64(form: Configuration, rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width).to(dtype)
    assert_as_accurate(added(x), outer_sum(x, dtype=torch.float32), outer_sum(x))
    mask = torch.rand(rows) > 0.4
    x[~mask] = torch.nan
    plain, truth = (-0.5 * outer_sum(x, mask, ones=True, dtype=t) for t in (torch.float32, torch.float64))
    assert_as_accurate(added(x, mask, -0.5, ones=True), plain, truth)


def test_a_launch_is_for_one_device() -> None:
    here, elsewhere = (
        syrk.problem(torch.empty(10, device=device), 4, torch.empty(8, 4, device=device), None, False)
        for device in ("cpu", "meta")
    )
    assert syrk.alike([here, elsewhere, here]) == [[here, here], [elsewhere]]


def test_rows_that_overlap(form: Configuration) -> None:
    """Windows over one sequence, and one row seen many times."""
    line = torch.randn(600)
    for x in (line.unfold(0, 64, 16), line[:64].expand(20, 64)):
        assert not triton_support.aligned(x)
        assert_as_accurate(added(x), outer_sum(x, dtype=torch.float32), outer_sum(x))


@pytest.mark.parametrize("rows", [64, 150, 257])
def test_split_rows_are_added_in_order(form: Configuration, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tiles and many programs: parts of the rows, then the second pass; the same bits twice."""
    many = replace(devices.INTERPRETER, multiprocessors=40)
    monkeypatch.setattr(syrk, "of_tensors", lambda _: many)
    monkeypatch.setattr(syrk, "ROWS_A_SPLIT", 32)
    # Parts are worth their traffic here, as if memory cost nothing.
    monkeypatch.setattr(syrk.support, "parts_of", lambda _tiles, _programs, most, *_: most)
    x = torch.randn(rows, 40)
    (parts,) = syrk.splits_of([rows], [syrk.tiles_of(40, form)], form, many, 4)
    assert parts == rows // 32
    first, second = added(x, alpha=2.0, ones=True), added(x, alpha=2.0, ones=True)
    assert torch.equal(first, second)
    plain, truth = (2.0 * outer_sum(x, ones=True, dtype=t) for t in (torch.float32, torch.float64))
    assert_as_accurate(first, plain, truth)


@pytest.mark.parametrize("many", [4, 64])
def test_unequal_problems_in_one_launch(form: Configuration, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different orders, rows, strides, ones and masks; some split, some not, one without rows."""
    device = replace(devices.INTERPRETER, multiprocessors=many)
    monkeypatch.setattr(syrk, "of_tensors", lambda _: device)
    monkeypatch.setattr(syrk, "ROWS_A_SPLIT", 32)
    shapes = [(150, 40, True), (7, 140, False), (0, 33, True), (70, 64, False), (1, 129, True), (20, 8, False)]
    problems, expected = [], []
    for rows, width, ones in shapes:
        x = torch.randn(rows, width + 8)[:, :width]
        mask = torch.rand(rows) > 0.3 if width % 3 else None
        acc = kk.PackedSymmetric(width + ones)
        problems.append((acc, syrk.problem(acc.data, acc.n, x, mask, ones)))
        expected.append([outer_sum(x, mask, ones=ones, dtype=t) for t in (torch.float32, torch.float64)])
    syrk.add_outer_products([p for _, p in problems], 1.0, False)
    for (acc, _), (plain, truth) in zip(problems, expected, strict=True):
        assert_as_accurate(acc.to_dense(), plain, truth)


def test_one_accumulator_several_times_in_a_call() -> None:
    """A layer that is called twice brings two problems for one triangle: they are never in one launch."""
    acc, other = kk.PackedSymmetric(40), kk.PackedSymmetric(24)
    x = [torch.randn(9, 40) for _ in range(3)]
    y = torch.randn(5, 24)
    problems = [syrk.problem(acc.data, 40, rows, None, False) for rows in x]
    problems.insert(1, syrk.problem(other.data, 24, y, None, False))
    launches = list(syrk.rounds(problems))
    assert [len(launch) for launch in launches] == [2, 1, 1]
    syrk.add_outer_products(problems, 1.0, False)
    stacked = torch.cat(x)
    assert_as_accurate(acc.to_dense(), outer_sum(stacked, dtype=torch.float32), outer_sum(stacked))
    assert_as_accurate(other.to_dense(), outer_sum(y, dtype=torch.float32), outer_sum(y))


def test_problems_that_compile_alike_go_together() -> None:
    acc = [kk.PackedSymmetric(16).data for _ in range(5)]
    wide = torch.randn(6, 17)
    rows = [torch.randn(6, 16), torch.randn(6, 16).half(), wide[:, :16], wide[:, 1:], torch.randn(9, 16)]
    mask = torch.ones(9, dtype=torch.bool)
    problems = [
        syrk.problem(a, 16, x, mask if i == 4 else None, False) for i, (a, x) in enumerate(zip(acc, rows, strict=True))
    ]
    groups = syrk.alike(problems)
    # Aligned float32, aligned float16, both views whose rows do not begin on 16 bytes, and the masked one.
    assert [len(group) for group in groups] == [1, 1, 2, 1]


def test_splits_fill_the_device_and_fit_their_workspace() -> None:
    h100 = devices.H100
    c = Configuration(block_m=128, block_n=128)
    for width, rows in ((576, 4096), (1024, 65536), (128, 10**6), (4096, 4096), (16384, 100)):
        tiles = syrk.tiles_of(width, c)
        (parts,) = syrk.splits_of([rows], [tiles], c, h100, 2)
        assert 1 <= parts <= max(1, rows // syrk.ROWS_A_SPLIT)
        assert parts == 1 or 4 * parts * tiles * c.block_m * c.block_n <= syrk.WORKSPACE_BYTES
    # 15 tiles on 132 multiprocessors: eight parts fill them in one round.
    assert syrk.splits_of([65536], [syrk.tiles_of(576, c)], c, h100, 2) == [8]
    # 528 tiles are four whole rounds; parts could not be faster.
    assert syrk.splits_of([16384], [syrk.tiles_of(4096, c)], c, h100, 2) == [1]
    # 136 tiles would be two rounds, the second nearly empty.
    assert syrk.splits_of([16384], [syrk.tiles_of(2048, c)], c, h100, 2)[0] > 1
    # The parts of a group are chosen together, and no problem has more than its rows allow.
    assert syrk.splits_of([65536, 600, 0], [15, 15, 15], c, h100, 2)[1:] == [1, 1]


def test_tf32_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syrk, "of_tensors", lambda _: devices.H100)
    p = [syrk.problem(kk.PackedSymmetric(64).data, 64, torch.randn(32, 64), None, False)]
    assert syrk.configure(p, allow_tf32=False).precision in ("ieee", "tf32x3", "bf16x6")
    assert syrk.configure(p, allow_tf32=True).precision == "tf32"
    half = [syrk.problem(kk.PackedSymmetric(64).data, 64, torch.randn(32, 64).half(), None, False)]
    assert syrk.configure(half, allow_tf32=True) == syrk.configure(half, allow_tf32=False)
    monkeypatch.setattr(syrk, "of_tensors", lambda _: devices.MI300X)
    assert syrk.configure(p, allow_tf32=True).precision == "ieee"
