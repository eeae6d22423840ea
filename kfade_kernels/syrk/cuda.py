"""`syrk_` and `accumulate_factors_` in CUDA (`csrc/cuda/`): 16-bit rows, all problems of a call in one launch.

FLOPs: `N·n²` a problem plus the upper parts of diagonal tiles. Bytes at least: x once a group of block rows, the
packed triangle read and written once every `flush` rows. Rows are split, and parts added in order, as Triton's
kernels do it: the two plan alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .. import cuda_support as cuda
from ..triton_support import short
from .triton import FEWEST_ROWS, SMALLEST_ORDER, Problem, alike, place, problem, rounds, splits_of, tiles_of


def add_outer_products(problems: Sequence[Problem], alpha: float) -> None:
    """Add all problems to their triangles."""
    for together in rounds(problems):
        for group in alike(together):
            _launch(group, alpha)


def _rows(problems: Sequence[Problem], form: cuda.Form) -> list[tuple[int, ...]]:
    """The problems as the module takes them, each with the rows of one part."""
    c = form.configuration()
    x = problems[0].x
    tiles = [tiles_of(p.width, c) for p in problems]
    splits = splits_of([p.rows for p in problems], tiles, c, cuda.device_at(x.device), x.element_size())
    return [
        (*place(p), p.rows, p.width, p.order, p.x.stride(0), cuda.part_of(p.rows, parts, form.depth))
        for p, parts in zip(problems, splits, strict=True)
    ]


def _launch(problems: list[Problem], alpha: float) -> None:
    library, where = cuda.library(), problems[0].x.device
    form, dtype = cuda.form_at("syrk", where), short(problems[0].x.dtype)
    rows = _rows(problems, form)
    data, items, partial_tiles, split_tiles = library.cuda_outer_table(form.kernel, dtype, rows)
    table = cuda.on_device(data, where)
    partials = cuda.workspace(partial_tiles * form.rows * form.columns, where)
    stream = cuda.stream_at(where)
    with cuda.at(where):
        library.cuda_outer(
            kernel=form.kernel, dtype=dtype, table=table.data_ptr(), items=items, partials=partials.data_ptr(),
            alpha=alpha, flush=form.flush, masked=problems[0].mask is not None, group=form.group,
            blocks=form.blocks(items, cuda.device_at(where)), stream=stream,
        )  # fmt: skip
        if split_tiles:
            library.cuda_ordered_sum(
                "outer", form.kernel, table.data_ptr(), split_tiles, partials.data_ptr(), alpha, form.group, stream
            )
        biased = [row for row, p in zip(rows, problems, strict=True) if p.ones_column]
        if biased:
            data, items, elements, blocks = library.cuda_column_table(biased)
            table = cuda.on_device(data, where)
            sums = cuda.workspace(elements, where)
            library.cuda_column_sums(dtype, table.data_ptr(), items, blocks, sums.data_ptr(), alpha, stream)


def run(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> None:
    add_outer_products([problem(packed, order, x, mask, ones_column)], alpha)


def gate(operation: str, packed: Sequence[Tensor], orders: Sequence[int], rows: Mapping[str, Tensor]) -> str | None:
    """Why problems are not served, or None; `rows` by their names. Small ones are served with one that is not."""
    for matrix, (name, x) in zip(packed, rows.items(), strict=True):
        reason = cuda.refusal(operation, "syrk", name, matrix, [x])
        if reason is not None:
            return reason
        if not cuda.aligned(x):
            return f"rows of {name} do not begin and end on 16 bytes"
    sizes = [(order, x.shape[:-1].numel()) for order, x in zip(orders, rows.values(), strict=True)]
    if any(order >= SMALLEST_ORDER and n >= FEWEST_ROWS for order, n in sizes):
        return None
    order, n = max(sizes)
    return f"order {order} with {n} rows is below {SMALLEST_ORDER} and {FEWEST_ROWS}"


def refuses(packed: Tensor, order: int, x: Tensor, *_: object) -> str | None:
    return gate("syrk_", [packed], [order], {"x": x})


def describe(problems: Sequence[Problem]) -> str:
    """Problems and launches of a call, and the form of the first launch."""
    groups = [group for together in rounds(problems) for group in alike(together)]
    if not groups:
        return "no rows"
    form = cuda.form_at("syrk", groups[0][0].x.device)
    parts = max(-(-row[3] // row[7]) for row in _rows(groups[0], form))
    split = f", rows in {parts} parts" if parts > 1 else ""
    return f"{len(problems)} problems in {len(groups)} launches, {form}{split}"


def configuration(
    packed: Tensor, order: int, x: Tensor, mask: Tensor | None, alpha: float, ones_column: bool, allow_tf32: bool
) -> str:
    return describe([problem(packed, order, x, mask, ones_column)])
