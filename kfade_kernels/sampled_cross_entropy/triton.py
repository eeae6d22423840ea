"""`sampled_cross_entropy` by Triton: labels given, or drawn by Gumbel-max.

On logits `[N, V]`: one read and one write of device memory, `2 N V` elements, as long as the rows in work
(programs × V elements) stay in the last-level cache until their second walk; one more read where they do not.
A sample costs about 70 instructions a word on sm_90, most of them for the noise, so arithmetic and not memory
is then the limit.

With the output projection: `4 N V d` FLOPs and nothing computed twice. For each chunk of the vocabulary the
logits come from a GEMM, the kernel turns them into exponentials relative to the running maximum, and a
second GEMM adds them, times the weight, to a running gradient that is rescaled on the way. The chunk takes
at most `CHUNK_BYTES`, the running gradient and its addend `8 d` bytes a row of at most `CHUNK_ROWS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import triton_support as support
from ..configurations import Configuration, choose
from ..devices import Device, of_tensors
from .noise import BELOW_ONE, ROUNDS

# Below this vocabulary a row is not worth a program of many warps.
SMALLEST_VOCABULARY = 1024
# A block, whatever the device: threads without words to work on are wasted.
SMALLEST_BLOCK = 1024
# Of a program.
MOST_THREADS = 1024
CHUNK_ROWS, CHUNK_BYTES = 8192, 256 << 20
# Chunks begin at multiples of this: whole Philox counters, whole 16-byte loads.
CHUNK_STEP = 256


def chunks_of(x: Tensor, vocabulary: int, chunk_rows: int) -> tuple[int, int]:
    """Rows and words of one chunk of logits."""
    rows = max(1, min(x.shape[0], chunk_rows or CHUNK_ROWS))
    words = CHUNK_BYTES // (rows * x.element_size()) // CHUNK_STEP * CHUNK_STEP
    return rows, min(max(words, CHUNK_STEP), vocabulary)


def adapt(found: Configuration, device: Device, is_aligned: bool) -> Configuration:
    """A configuration for these rows: twice the warps where loads are element-wise, which takes registers."""
    warps = found.warps if is_aligned else min(2 * found.warps, MOST_THREADS // device.threads)
    return replace(found, block_n=max(found.block_n, SMALLEST_BLOCK), warps=warps)


def configure(rows: Tensor, is_aligned: bool) -> Configuration:
    """The configuration of a launch on rows of logits."""
    device = of_tensors(rows.device)
    found = choose("sampled_cross_entropy", device, rows.dtype, rows.shape[1], support.triton_version())
    return adapt(found, device, is_aligned)


def _constants(c: Configuration, sampled: bool, is_aligned: bool) -> dict[str, object]:
    return {
        "SAMPLED": sampled, "ALIGNED": is_aligned, "ROUNDS": ROUNDS, "BELOW_ONE": BELOW_ONE, "BLOCK": c.block_n,
    }  # fmt: skip


def _launch(kernel: object, logits: Tensor, labels: Tensor, keys: Tensor | None, is_aligned: bool, **more: Any) -> None:
    c = configure(logits, is_aligned)
    rows = logits.shape[0]
    support.launch(
        kernel, support.grid(rows, c, of_tensors(logits.device)), c, logits.device, logits=logits,
        keys=labels if keys is None else keys, labels=labels, rows=rows,
        **more, **_constants(c, keys is not None, is_aligned),
    )  # fmt: skip


def on_logits(x: Tensor, labels: Tensor, keys: Tensor | None, grad: Tensor, nll: Tensor) -> None:
    """Rows of logits: gradient and negative log-likelihood, and the labels where keys are given."""
    from .kernel import logits_kernel

    x = support.rows_of(x)
    # The kernel writes along rows; the result has the strides of the caller's x.
    out = grad if grad.stride(1) == 1 or grad.shape[1] == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(
        logits_kernel, x, labels, keys, support.aligned(x) and support.aligned(out), grad=out, nll=nll,
        vocabulary=x.shape[1], stride=x.stride(0), grad_stride=out.stride(0),
    )  # fmt: skip
    if out is not grad:
        grad.copy_(out)


def _product(p: Tensor, weight: Tensor) -> Tensor:
    """`p @ weight` with float32 sums and a float32 result; a CPU rounds 16-bit products, so it gets float32."""
    if p.dtype != torch.float32 and p.device.type == "cuda":
        return torch.mm(p, weight, out_dtype=torch.float32)
    return p.float() @ weight.float()


def through_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    keys: Tensor | None,
    words: int,
) -> tuple[Tensor, Tensor]:
    """Gradient on the hidden states and negative log-likelihood, both float32; the labels where keys are given.

    Args:
        words: of one chunk of the vocabulary, a multiple of `CHUNK_STEP` or all of them.
    """
    from .kernel import chunk_kernel

    state = torch.zeros(5, x.shape[0], dtype=torch.float32, device=x.device)
    maxima, totals, scores, chosen, rescale = state.unbind()
    maxima.fill_(-torch.inf)
    scores.fill_(-torch.inf)
    grad = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for first in range(0, weight.shape[0], words):
        part = weight[first : first + words]
        logits = torch.nn.functional.linear(x, part, None if bias is None else bias[first : first + words])
        _launch(
            chunk_kernel, logits, labels, keys, support.aligned(logits), maxima=maxima, totals=totals, scores=scores,
            chosen=chosen, rescale=rescale, width=part.shape[0], first=first,
        )  # fmt: skip
        torch.addcmul(_product(logits, part), grad, rescale.unsqueeze(1), out=grad)
    grad.div_(totals.unsqueeze(1)).sub_(weight.index_select(0, labels))
    return grad, totals.log().add_(maxima.sub_(chosen))


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    keys: Tensor | None,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = x.shape[0], x.shape[1] if weight is None else weight.shape[0]
    if labels is not None:
        # On a GPU this waits for nothing: the error comes up later, like that of an index out of range.
        torch._assert_async(((labels >= 0) & (labels < vocabulary)).all(), f"labels must be from 0 to {vocabulary - 1}")
    found = torch.zeros(rows, dtype=torch.int64, device=x.device) if labels is None else labels.clone()
    grad = torch.empty_like(x)
    nll = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return found, grad, nll
    keys = None if keys is None else keys.contiguous()
    if weight is None:
        on_logits(x, found, keys, grad, nll)
        return found, grad, nll
    step, words = chunks_of(x, vocabulary, chunk_rows)
    for start in range(0, rows, step):
        some = slice(start, start + step)
        part_keys = None if keys is None else keys[some]
        grad[some], nll[some] = through_projection(x[some], weight, bias, found[some], part_keys, words)
    return found, grad, nll


def refuses(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    uniform: Tensor | None,
    labels: Tensor | None,
    keys: Tensor | None,
    chunk_rows: int,
) -> str | None:
    reason = support.refusal("sampled_cross_entropy", "x", x.device, (x.dtype,))
    if reason is not None:
        return reason
    if uniform is not None:
        return "uniform draws by inverse CDF; give keys"
    vocabulary = x.shape[1] if weight is None else weight.shape[0]
    if vocabulary < SMALLEST_VOCABULARY and not support.interpreted():
        return f"vocabulary of {vocabulary} words is below {SMALLEST_VOCABULARY}"
    return None


def configuration(
    x: Tensor,
    weight: Tensor | None,
    bias: object,
    uniform: object,
    labels: object,
    keys: object,
    chunk_rows: int,
) -> str:
    if weight is None:
        c = configure(x, support.aligned(x))
        return f"blocks of {c.block_n} words, {c.warps} warps"
    rows, words = chunks_of(x, weight.shape[0], chunk_rows)
    c = configure(x.new_empty(0, words), words * x.element_size() % 16 == 0)
    return f"chunks of {rows} rows × {words} words, blocks of {c.block_n} words, {c.warps} warps"


def variants(device: Device) -> list[support.Variant]:
    """Every compiled form that shipped configurations can ask for on a device."""
    from .kernel import chunk_kernel, logits_kernel

    found = {}
    state = ("maxima", "totals", "scores", "chosen", "rescale")
    for dtype, shipped in support.shipped_configurations("sampled_cross_entropy", device):
        element = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
        shared = {"logits": element, "keys": "*i64", "labels": "*i64", "rows": "i32"}
        forms = {
            "logits": (logits_kernel, {
                "grad": element, "nll": "*fp32", "vocabulary": "i32", "stride": "i32", "grad_stride": "i32",
            }),
            "chunk": (chunk_kernel, {"width": "i32", "first": "i32", **dict.fromkeys(state, "*fp32")}),
        }  # fmt: skip
        for form, (kernel, signature) in forms.items():
            for sampled in (True, False):
                for is_aligned in (True, False):
                    c = adapt(shipped, device, is_aligned)
                    one = support.Variant(
                        f"sampled_cross_entropy {form} {support.short(dtype)}{' keys' if sampled else ''}"
                        f"{'' if is_aligned else ' any rows'}",
                        kernel, {**shared, **signature}, _constants(c, sampled, is_aligned), c, products=False,
                        itemsizes=(dtype.itemsize, dtype.itemsize),
                    )  # fmt: skip
                    found[one.name, c] = one
    return list(found.values())
