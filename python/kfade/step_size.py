"""The longest step whose measured KL is within a budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from .outcome import Trial


def search_step_size(
    measure: Callable[[float], float],
    predicted: Callable[[float], float],
    first: float,
    at_zero: float,
    target: float,
    trials: int,
    limit: float = math.inf,
) -> tuple[float, list[Trial]]:
    """The largest η found whose measured KL is at most `target`; 0 if none was.

    Args:
        measure: η → measured KL.
        predicted: η → predicted KL, recorded beside it.
        first: where to begin.
        at_zero: measured KL at η = 0.
        target: budget.
        trials: at most so many measurements.
        limit: no η beyond it is tried.

    KL above `at_zero` is taken as a power of η, quadratic at first and then as the last two
    measurements say, and the next η aims 5 % below the target, inside the bracket of the largest good
    and the smallest bad one. Within 8 % of the target is enough. Where a step of twice the length or more
    adds less than a tenth to the KL, it has saturated, and longer ones would only destroy: the search ends.
    """
    low, high = 0.0, math.inf
    eta, power = first, 2.0
    last_eta = last_share = 0.0
    done: list[Trial] = []
    for number in range(trials):
        kl = measure(eta)
        done.append(Trial(eta, predicted(eta), kl))
        share = (kl - at_zero) / (target - at_zero) if math.isfinite(kl) else math.inf
        if kl <= target:
            saturated = eta >= 2 * last_eta > 0 and 0.01 < share < 1.1 * last_share
            if saturated:
                break
            low = max(low, eta)
            if share >= 0.92 or eta >= limit:
                break
        else:
            high = min(high, eta)
        if 0 < last_share < math.inf and 0 < share < math.inf and share != last_share and eta != last_eta:
            power = min(4.0, max(0.5, math.log(share / last_share) / math.log(eta / last_eta)))
        last_eta, last_share = eta, share
        guess = eta * (0.95 / share) ** (1 / power) if 0 < share < math.inf else 0.0
        if low == 0.0:
            # Each miss in a row aims a little lower, so that a wrong power cannot creep up on the target.
            guess *= 0.9**number
        if low < guess < high:
            eta = min(guess, 30 * eta)
        elif low == 0.0:
            eta = high / 4 if math.isfinite(high) else 4 * eta
        else:
            eta = math.sqrt(low * high) if math.isfinite(high) else 4 * low
        eta = min(eta, limit)
    return low, done
