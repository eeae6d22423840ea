"""The cases of `gpu.py`: what is checked, and what is timed, in tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kfade_kernels import problems
from kfade_kernels.problems import Problem

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Make = Callable[[torch.device], Problem]


def _make(maker: Callable[..., Problem], *sizes: Any, dtype: torch.dtype, **options: Any) -> Make:
    return lambda device: maker(*sizes, dtype=dtype, device=device, **options)


# ------------------------------------------------------------------------------------ correctness


def _outer_product(rows: int, order: int, **options: Any) -> tuple[Any, ...]:
    return problems.outer_product, (rows, order), options


@dataclass(frozen=True)
class Checks:
    """Problems of one operation, as (maker, sizes, options).

    Attributes:
        full: with sizes that no tile divides, that fill a GPU, and that take every path.
        tiny: for the interpreter.
    """

    full: Sequence[tuple[Callable[..., Problem], tuple[Any, ...], Mapping[str, Any]]]
    tiny: Sequence[tuple[Callable[..., Problem], tuple[Any, ...], Mapping[str, Any]]]

    def problems(self, dry: bool, dtypes: Sequence[torch.dtype]) -> list[tuple[torch.dtype, Make]]:
        return [
            (dtype, _make(maker, *sizes, dtype=dtype, **options))
            for dtype in dtypes
            for maker, sizes, options in (self.tiny if dry else self.full)
        ]


_MASKED, _ONES = {"masked": True}, {"ones_column": True}
CHECKS = {
    "syrk_": Checks(
        full=[
            # Orders around tiles and panels; rows that end inside a step; few tiles, so that rows are split;
            # more rows than one flush; strides that are whole 16-byte pieces, and that are not.
            *(_outer_product(rows, order) for rows in (16, 1000) for order in (64, 127, 128, 129, 300, 1025)),
            _outer_product(20_000, 256),
            _outer_product(20_000, 2304),
            _outer_product(8200, 4100),
            _outer_product(8200, 4104),
            _outer_product(1000, 300, **_MASKED),
            _outer_product(1000, 1024, **_MASKED),
            _outer_product(1000, 257, **_ONES),
            _outer_product(1000, 1025, **_MASKED, **_ONES),
            _outer_product(1000, 512, allow_tf32=True),
            _outer_product(1000, 512, padding=64),
            _outer_product(1000, 512, padding=3),
        ],
        tiny=[_outer_product(40, 150), _outer_product(40, 150, **_MASKED, **_ONES), _outer_product(24, 130, padding=3)],
    ),
    "accumulate_factors_": Checks(
        full=[
            (problems.outer_products, ([(2000, 1024)] * 16,), {}),
            (problems.outer_products, ([(1000, 300), (500, 129), (2000, 896), (16, 2048)],), {}),
            (problems.outer_products, ([(1000, 301), (500, 129), (1000, 896), (500, 513)],), _ONES),
            (problems.outer_products, ([(1000, 305), (500, 129), (2000, 904), (16, 2048)],), _ONES),
        ],
        tiny=[(problems.outer_products, ([(40, 70), (24, 40), (40, 50), (24, 130)],), _ONES)],
    ),
    "sketch_": Checks(
        full=[
            (problems.sketch, (1000, 300, 26), {}),
            (problems.sketch, (20_000, 1024, 74), {}),
            (problems.sketch, (4096, 1025, 138), {}),
            (problems.sketch, (3000, 512, 64), _MASKED),
            (problems.sketch, (3000, 257, 20), {**_MASKED, **_ONES}),
        ],
        tiny=[(problems.sketch, (700, 70, 6), {**_MASKED, **_ONES})],
    ),
    "rotate": Checks(
        full=[
            (problems.rotation, (rows, width), options)
            for rows, width in ((100, 64), (1000, 300), (4096, 1024), (333, 1025))
            for options in ({}, _ONES)
        ],
        tiny=[(problems.rotation, (20, 70), _ONES)],
    ),
    "eigenvalue_correction_": Checks(
        full=[
            # Tokens below and above both widths: each side is rotated as tokens and as gradients.
            (problems.correction, (8, 60, 512, 1024), {}),
            (problems.correction, (5, 100, 300, 130), {}),
            (problems.correction, (3, 600, 512, 256), {}),
            (problems.correction, (3, 400, 512, 256), _MASKED),
            (problems.correction, (4, 70, 300, 131), {**_MASKED, **_ONES}),
            (problems.correction, (200, 1, 256, 512), {}),
            (problems.correction, (6, 130, 384, 640), {"rotated": True}),
            (problems.correction, (7, 90, 384, 640), {"packed": True}),
            (problems.correction, (5, 600, 300, 131), {"packed": True, **_MASKED, **_ONES}),
        ],
        tiny=[
            (problems.correction, (2, 9, 33, 70), {**_MASKED, **_ONES}),
            (problems.correction, (2, 40, 33, 20), {"rotated": True}),
            (problems.correction, (3, 12, 33, 20), {"packed": True}),
        ],
    ),
    "kron_solve": Checks(
        full=[
            (problems.solve, (300, 130), {}),
            (problems.solve, (1024, 512), {"pair": True}),
            (problems.solve, (512, 257), {"batch": 3}),
            (problems.solve, (1024, 2048), {}),
            (problems.solve, (1024, 512), {"tokens": 60}),
            (problems.solves, ([(300, 130), (1024, 512), (129, 1000)],), {}),
        ],
        tiny=[(problems.solve, (33, 70), {"pair": True}), (problems.solves, ([(33, 20), (20, 70)],), {})],
    ),
    "sampled_cross_entropy": Checks(
        full=[
            (problems.cross_entropy, (rows, vocabulary), {"labels": labels, **hidden})
            for rows, vocabulary, hidden in (
                (100, 1025, {}), (1000, 32_000, {}), (300, 151_936, {}), (300, 50_257, {"hidden": 768}),
                (1000, 151_936, {"hidden": 896}),
            )
            for labels in ("keys", "given")
        ],
        tiny=[
            (problems.cross_entropy, (5, 1100), {"labels": labels, **hidden})
            for labels in ("keys", "given")
            for hidden in ({}, {"hidden": 16})
        ],
    ),
    "apply_update_": Checks(
        full=[
            (problems.update, ([(1000, 77), (4096, 512), (5,)],), {"along": along}) for along in (True, False)
        ],
        tiny=[(problems.update, ([(3, 5), (1100,)],), {})],
    ),
}  # fmt: skip

# ----------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Timing:
    """One problem to time.

    Attributes:
        make: on a device.
        compiled: name of the PyTorch expression that is also timed under `torch.compile`.
    """

    make: Make
    compiled: str = ""


def _grid(maker: Callable[..., Problem], grid: Sequence[tuple[Any, ...]], dtype: torch.dtype, **options: Any) -> Any:
    return [Timing(_make(maker, *sizes, dtype=dtype, **options)) for sizes in grid]


_ORDERS, _ROWS = (1024, 2048, 4096, 8192, 16384), (4096, 16384, 65536)
# MLP layers (d_out, d_in) of Qwen2.5-0.5B, of 1.5B, and of Llama-2-7B.
_MLPS = ((4864, 896), (8960, 1536), (11008, 4096))
PLAN: dict[str, list[Timing]] = {
    "syrk": [
        *_grid(problems.outer_product, [(rows, order) for order in _ORDERS for rows in _ROWS], BF16),
        *_grid(problems.outer_product, [(16384, order) for order in _ORDERS[1:4]], F32),
        *_grid(problems.outer_product, [(16384, order) for order in _ORDERS[1:4]], F32, allow_tf32=True),
    ],
    "grouped": [
        *_grid(problems.outer_products, [([(rows, 1024)] * 32,) for rows in _ROWS[:2]], BF16),
        *_grid(problems.outer_products, [([(rows, 2048)] * 8,) for rows in _ROWS[:2]], BF16),
        # A block of Qwen2.5-0.5B: inputs of the MLP, then the gradients of its outputs.
        *_grid(problems.outer_products, [([(4096, 896), (4096, 4864), (4096, 4864), (4096, 896)],)], BF16),
    ],
    "sketch": [
        *_grid(problems.sketch, [(rows, order, 138) for order in (4096, 16384) for rows in _ROWS[:2]], BF16),
        *_grid(problems.sketch, [(16384, 4096, columns) for columns in (26, 522)], BF16),
        *_grid(problems.sketch, [(16384, 4096, 138)], F32),
    ],
    "correction": [
        *_grid(problems.correction, [(8, tokens, 4096, 11008) for tokens in (64, 512, 2048)], BF16),
        *_grid(problems.correction, [(8, 512, 4096, 11008)], BF16, rotated=True),
        *_grid(problems.rotation, [(4096, 4096), (4096, 11008)], BF16),
    ],
    "solve": [
        *(Timing(_make(problems.solve, *shape, dtype=F32), compiled="eager") for shape in _MLPS),
        *_grid(problems.solve, [(4864, 896)], F32, batch=8),
        *_grid(problems.solve, [_MLPS[0]], F32, tokens=64),
        *_grid(problems.solves, [([_MLPS[0], _MLPS[0], _MLPS[0][::-1]] * 8,)], F32),
    ],
    "cross-entropy": [
        *_grid(problems.cross_entropy, [(4096, 151_936)], BF16, labels="keys"),
        *_grid(problems.cross_entropy, [(4096, 151_936)], BF16, labels="given"),
        *(
            Timing(_make(problems.cross_entropy, 4096, 151_936, dtype=BF16, hidden=hidden, labels="keys"))
            for hidden in (896, 1536, 3584)
        ),
    ],
    "apply": [
        *_grid(problems.update, [([(4864, 896)] * 72,), ([(8960, 1536)] * 84,)], BF16),
        *_grid(problems.update, [([(4864, 896)] * 72,)], BF16, along=False),
    ],
}

# (dtype, order, matrices at once)
EIGH = [(dtype, order, batch) for dtype in (F32, torch.float64) for order, batch in
        ((4096, 1), (4096, 8), (8192, 1), (8192, 2), (16384, 1), (16384, 2))]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model, and what the published EK-FAC fit of it took, in seconds a stage.

    1,000 sequences of at most 512 tokens, MLP layers, said to be on eight H100.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    published: Mapping[str, float]
    vocab_size: int = 151_936

    @property
    def linear_parameters(self) -> int:
        """Of the linear layers and the output projection."""
        h, kv = self.hidden_size, self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        layer = 2 * h * h + 2 * h * kv + 3 * h * self.intermediate_size
        return self.num_hidden_layers * layer + self.vocab_size * h


MODELS = {
    "Qwen2.5-0.5B": Shape(896, 4864, 24, 14, 2, {"A, S": 6.6, "eigh": 32.0, "eigenvalues": 8.6}),
    "Qwen2.5-1.5B": Shape(1536, 8960, 28, 12, 2, {"A, S": 21.0, "eigh": 137.0, "eigenvalues": 35.0}),
}
SEQUENCES, TOKENS, BATCH = 1000, 512, 8
