"""Statistics of success rates."""

import math
from statistics import NormalDist


def wilson_interval(num_successes: int, num_trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a success rate (Wilson 1927), within 0 .. 1; (0, 1) without trials."""
    assert 0 <= num_successes <= num_trials, (num_successes, num_trials)
    if num_trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = num_successes / num_trials, z * z / num_trials
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / num_trials + spread / (4 * num_trials)) / (1 + spread)
    # at the ends the interval reaches 0 or 1 exactly, which rounding may miss
    low = 0.0 if num_successes == 0 else max(0.0, middle - half)
    high = 1.0 if num_successes == num_trials else min(1.0, middle + half)
    return low, high
