"""Random numbers that depend on nothing but a key and a counter, in integer arithmetic that any device repeats.

Uniform numbers come from SplitMix64, a few operations each. The Gumbel noise of a whole vocabulary comes
from Philox4x32 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), which a kernel can
compute four words at a time without a table. It runs with 7 rounds, the fewest that pass BigCrush there;
the usual 10 are a margin that would make the kernel a third slower where integer units are its limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7
# Multipliers and key increments of Philox4x32.
_M0, _M1, _W0, _W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_GOLDEN = -0x61C8864680B583EB
# The largest float32 below 1: the noise stays finite where a number rounds to 1.
BELOW_ONE = 1 - 2.0**-24


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014) on int64, whose arithmetic wraps."""

    def shift(v: Tensor, bits: int) -> Tensor:
        return (v >> bits) & ((1 << (64 - bits)) - 1)

    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shift(z, 31)


def counter_bits(keys: Tensor, counters: Tensor) -> Tensor:
    """64 random bits that depend on nothing but a key and a counter.

    Args:
        keys: int64, any shape: what the stream belongs to (a sequence, a seed).
        counters: int64, broadcast against `keys`: the position in the stream.

    Returns:
        int64, e.g. the keys of `sampled_cross_entropy`.
    """
    return _mix(_mix(keys + _GOLDEN) + counters * _GOLDEN)


def counter_uniform(keys: Tensor, counters: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but a key and a counter.

    Args:
        keys: int64, any shape: what the stream belongs to (a sequence, a seed).
        counters: int64, broadcast against `keys`: the position in the stream.

    Returns:
        float32, 24 random bits each.
    """
    return ((counter_bits(keys, counters) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def philox(keys: Tensor, counter: Sequence[Tensor], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox4x32 of a counter of four words, under both halves of int64 keys (the low one first).

    Args:
        keys: int64, any shape.
        counter: four int64 tensors in [0, 2³²), broadcast against `keys`, the first the low word.
        rounds: of the cipher.

    Returns:
        Four int64 tensors of random numbers in [0, 2³²).
    """
    k0, k1 = keys & _WORD, (keys >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        # An int64 product of two 32-bit numbers may wrap, but its 64 bits are right.
        first, second = c0 * _M0, c2 * _M1
        c0, c1 = ((second >> 32) & _WORD) ^ c1 ^ k0, second & _WORD
        c2, c3 = ((first >> 32) & _WORD) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3


def _four_words(keys: Tensor, counters: Tensor) -> Tensor:
    """The numbers of counters (counter, 0, 0, 0), in a last dimension of four."""
    zero = counters.new_zeros(())
    return torch.stack(philox(keys, (counters, zero, zero, zero)), -1)


def _gumbel(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """`−log(−log(1 − v))` of `v = (bits + ½) 2⁻³²`: it is small v that win, and they keep their relative precision."""
    v = bits.to(dtype).add_(0.5).mul_(2.0**-32).clamp_(max=BELOW_ONE)
    return v.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(keys: Tensor, words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise of a word of the vocabulary under a key, and of nothing else.

    Word w takes number w mod 4 of the four that Philox4x32 gives for the counter ⌊w / 4⌋.

    Args:
        keys: int64, any shape.
        words: int64 at least 0, broadcast against `keys`.
        dtype: float32 or float64.

    Returns:
        Noise between -2.9 and 22.9, in steps of 2⁻³² of the underlying uniform number.
    """
    keys, words = torch.broadcast_tensors(keys, words)
    four = _four_words(keys, words // 4)
    return _gumbel(four.gather(-1, (words % 4).unsqueeze(-1)).squeeze(-1), dtype)


def vocabulary_noise(keys: Tensor, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`gumbel_noise` of words 0 to `vocabulary - 1` under each of `keys [N]`: `[N, vocabulary]`, four words a step."""
    counters = torch.arange(-(-vocabulary // 4), device=keys.device)
    four = _four_words(keys.unsqueeze(-1), counters)
    return _gumbel(four.flatten(1)[:, :vocabulary], dtype)
