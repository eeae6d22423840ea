"""The kernels of `sampled_cross_entropy`: a program takes whole rows, one after another.

Each row is walked twice, in blocks: for its maximum, its sum of exponentials and its sample, and then for
what is written. The second walk goes backwards, so that it begins with what the caches still hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _split(x):
    """`f, e` with `x = (1 + f) 2ᵉ` and 1 + f from √½ to √2, for a positive normal x."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    return (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0, e


@triton.jit
def _log(f, e):
    """`log((1 + f) 2ᵉ)` with a relative error of 2e-7 also near 1, in half the instructions of the libraries'.

    `f` times the polynomial of degree 7 with the least largest relative error against `log(1 + f) / f`.
    """
    q = -0.172508297 + f * (0.162225809 + f * -0.101068961)
    q = 0.333350589 + f * (-0.249699091 + f * (0.199001654 + f * q))
    q = 0.999999945 + f * (-0.500003651 + f * q)
    return e.to(tl.float32) * LN2 + f * q


@triton.jit
def gumbel_noise(key, first, ROUNDS: tl.constexpr, BELOW_ONE: tl.constexpr, BLOCK: tl.constexpr):
    """`gumbel_noise` of words first to first + BLOCK - 1, `first` a multiple of 4; see `noise.py`."""
    counters = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    a, b, c, d = tl.philox(key, counters, 0, 0, 0, ROUNDS)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK,))
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, BELOW_ONE)
    f, e = _split(1.0 - v)
    # Small v win, and 1 − v has lost what tells them apart.
    f, e = _split(-_log(tl.where(e == 0, -v, f), e))
    return -_log(f, e)


@triton.jit
def _not_minus_infinity(x):
    """x, or 0 for −∞, which must not be subtracted from itself."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _sweep(
    source,
    first,
    width,
    key,
    maximum,
    SAMPLED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BELOW_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first walk, over words first to first + width - 1 of one row.

    Returns the new running maximum, the sum of `exp(logit − maximum)` over these words, the best perturbed
    score and the lowest word that has it. Each lane keeps a sum and a best word of its own until the end.
    """
    n = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    word = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        at = start + n
        value = tl.load(source + at, mask=at < width, other=float("-inf"), eviction_policy="evict_last")
        value = value.to(tl.float32)
        previous = maximum
        maximum = tl.maximum(maximum, tl.max(value, 0))
        origin = _not_minus_infinity(maximum)
        total = total * tl.exp(previous - origin) + tl.exp(value - origin)
        if SAMPLED:
            score = value + gumbel_noise(key, first + start, ROUNDS, BELOW_ONE, BLOCK)
            better = score > best
            best = tl.where(better, score, best)
            word = tl.where(better, first + at, word)
    top = tl.max(best, 0)
    return maximum, tl.sum(total, 0), top, tl.min(tl.where(best == top, word, 2147483647), 0)


@triton.jit(do_not_specialize=["rows", "vocabulary", "stride", "grad_stride"])
def logits_kernel(
    logits,
    keys,
    labels,
    grad,
    nll,
    rows,
    vocabulary,
    stride,
    grad_stride,
    SAMPLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BELOW_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Labels (given, or written here), gradient and negative log-likelihood of rows of logits."""
    STEP: tl.constexpr = 16 // (logits.dtype.element_ty.primitive_bitwidth // 8)
    if ALIGNED:
        # Changes nothing; a hint on an argument (`tl.multiple_of`) would be lost.
        stride = stride // STEP * STEP
        grad_stride = grad_stride // STEP * STEP
        vocabulary = vocabulary // STEP * STEP
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        source = logits + tl.cast(row, tl.int64) * stride
        target = grad + tl.cast(row, tl.int64) * grad_stride
        key = tl.load(keys + row)
        nothing = tl.full((), float("-inf"), tl.float32)
        maximum, total, _, word = _sweep(source, 0, vocabulary, key, nothing, SAMPLED, ROUNDS, BELOW_ONE, BLOCK)
        if SAMPLED:
            tl.store(labels + row, word.to(tl.int64))
            label = word
        else:
            label = tl.load(labels + row).to(tl.int32)
        chosen = tl.load(source + label, mask=(label >= 0) & (label < vocabulary), other=0.0).to(tl.float32)
        origin = _not_minus_infinity(maximum)
        tl.store(nll + row, tl.log(total) + (origin - chosen))
        scale = 1.0 / total
        blocks = tl.cdiv(vocabulary, BLOCK)
        for step in range(blocks):
            at = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(source + at, mask=at < vocabulary, other=0.0, eviction_policy="evict_first")
            p = tl.exp(value.to(tl.float32) - origin) * scale
            p = tl.where(at == label, p - 1.0, p)
            tl.store(target + at, p.to(grad.dtype.element_ty), mask=at < vocabulary, cache_modifier=".cs")


@triton.jit(do_not_specialize=["rows", "width", "first"])
def chunk_kernel(
    logits,
    keys,
    labels,
    maxima,
    totals,
    scores,
    chosen,
    rescale,
    rows,
    width,
    first,
    SAMPLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BELOW_ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of the vocabulary, words first to first + width - 1, of contiguous rows of logits.

    Running state of each row: maximum, sum of exponentials, best perturbed score, label and its logit. The
    logits become `exp(logit − maximum)`, and `rescale` what earlier sums must be multiplied by.
    """
    STEP: tl.constexpr = 16 // (logits.dtype.element_ty.primitive_bitwidth // 8)
    if ALIGNED:
        width = width // STEP * STEP
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        line = logits + tl.cast(row, tl.int64) * width
        key = tl.load(keys + row)
        previous = tl.load(maxima + row)
        sum_before = tl.load(totals + row)
        score_before = tl.load(scores + row)
        place = (tl.load(labels + row) - first).to(tl.int32)
        maximum, total, score, word = _sweep(line, first, width, key, previous, SAMPLED, ROUNDS, BELOW_ONE, BLOCK)
        if SAMPLED:
            # Equal scores leave the label of an earlier chunk, which is the lower word.
            better = score > score_before
            tl.store(scores + row, score, mask=better)
            tl.store(labels + row, word.to(tl.int64), mask=better)
            place = tl.where(better, word - first, -1)
        here = (place >= 0) & (place < width)
        tl.store(chosen + row, tl.load(line + place, mask=here, other=0.0).to(tl.float32), mask=here)
        origin = _not_minus_infinity(maximum)
        factor = tl.exp(previous - origin)
        tl.store(rescale + row, factor)
        tl.store(maxima + row, maximum)
        tl.store(totals + row, sum_before * factor + total)
        # The label's logit has been read by all before it is overwritten by one.
        tl.debug_barrier()
        blocks = tl.cdiv(width, BLOCK)
        for step in range(blocks):
            at = (blocks - 1 - step) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(line + at, mask=at < width, other=float("-inf"))
            p = tl.exp(value.to(tl.float32) - origin)
            tl.store(line + at, p.to(logits.dtype.element_ty), mask=at < width)
