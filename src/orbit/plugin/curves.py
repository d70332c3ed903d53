"""What a loss curve shows, told apart from its noise. Pure functions of numbers; `Mentor` says when to ask.

A curve is a list of `Point`s: a value, and its standard error where that is known (an interval's mean over its steps).
Every function returns its evidence, the numbers that the finding rests on, or None.

diverged     the last value is far above the best one, and gives back a good part of what was gained
flat         a line through the last values does not fall, and is known well enough to say so
overfits     after its best value the validation loss rose by more than its noise, while the training loss fell
swings       large rises and large falls follow each other, beyond the noise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import NamedTuple

_GIVEN_BACK = 0.2  # of what was gained, from where on a rise is divergence: noise near 0 has large ratios
_FLAT = 0.003  # of the level: a fall that is known to be less does not count
_RISE = 0.05  # of the best validation loss
_SWING = 0.2  # of the level
_LOOKS_BACK = 8  # points that are looked at for swings

Evidence = dict[str, float]


class Point(NamedTuple):
    value: float
    error: float = 0.0


def summary(losses: Sequence[float]) -> Point:
    """The mean of an interval's losses with its standard error: one bad batch raises both.

    >>> summary([1.0, 2.0, 3.0, 2.0])
    Point(value=2.0, error=0.408...)
    """
    return Point(fmean(losses), stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0)


def beginning(losses: Sequence[float], times: float) -> list[Point]:
    """The first step's loss as a point of its own, if all others of the first interval are `times` as high: of 50 draws
    the first is hardly ever so much lower than the rest by chance, and a run that blows up at once has no other.

    >>> beginning([0.7, 31.0, 28.0, 30.0], times=2), beginning([0.7, 0.3, 0.9], times=2)
    ([Point(value=0.7, error=0.0)], [])
    """
    first, *rest = losses
    return [Point(first)] if len(rest) > 2 and 0 < times * first < min(rest) else []


def diverged(curve: Sequence[Point], times: float) -> Evidence | None:
    """The last value is `times` the best one before it.

    >>> diverged([Point(2.0), Point(1.0), Point(2.5)], times=2)
    {'loss': 2.5, 'best': 1.0}
    """
    if len(curve) < 2:
        return None
    *past, last = curve
    best = min(past)
    rise, gained = last.value - best.value, past[0].value - best.value
    far = last.value > times * best.value if best.value > 0 else rise > max(gained, (times - 1) * -best.value)
    if far and rise > _GIVEN_BACK * gained and rise > 5 * math.hypot(last.error, best.error):
        return {"loss": last.value, "best": best.value}
    return None


def flat(curve: Sequence[Point], patience: int, threshold: float) -> Evidence | None:
    """The curve falls by less than `threshold`, or by nothing that could be told from 0 and surely less than 0.3 %, in
    `patience` points. Looked for in the last patience + 1 points, and in twice, four and eight times as many.

    >>> flat([Point(v) for v in (2.0, 1.0, 1.0, 1.0, 1.0)], patience=3, threshold=1e-4)
    {'loss': 1.0, 'fall': 0.0, 'points': 4}
    """
    for times in (1, 2, 4, 8):
        points = times * (patience + 1)
        values = [point.value for point in curve[-points:]]
        if len(values) < max(points, 3):
            return None
        slope, error = _line(values)
        fall, doubt, level = -slope * patience, error * patience, fmean(values)
        unclear = abs(fall) < max(threshold, 3 * doubt)
        surely = _t(points - 2) * doubt
        if unclear and fall + surely < max(threshold, _FLAT * abs(level)):
            return {"loss": level, "fall": fall + 0.0, "points": points}
    return None


def overfits(train: Sequence[float], val: Sequence[float]) -> Evidence | None:
    """Since its best value, at least two epochs ago, the validation loss has risen and the training loss has fallen.

    >>> overfits([3.0, 2.0, 1.5], [1.0, 1.1, 1.2])
    {'val_loss': 1.2, 'best': 1.0, 'epochs_since': 2, 'train_fell': 1.5}
    """
    best = min(range(len(val)), key=val.__getitem__, default=0)
    since = len(val) - 1 - best
    if since < 2 or train[-1] >= train[best]:
        return None
    if len(val) < 5:  # too few to know the noise: each must be worse than the one before
        if any(later <= sooner for sooner, later in zip(val[best:], val[best + 1 :], strict=False)):
            return None
        rise, noise = fmean(val[-2:]) - val[best], 0.0
    else:  # the best of many is good by chance: ask its neighbours too
        rise, noise = fmean(val[-3:]) - fmean(val[max(0, best - 1) : best + 2]), _noise(val)
    if since < 3 <= len(val) - 2 or rise <= max(
        _RISE * abs(val[best]), 0.02 * (val[0] - val[best]), 3 * noise
    ):
        return None
    return {
        "val_loss": val[-1],
        "best": val[best],
        "epochs_since": since,
        "train_fell": train[best] - train[-1],
    }


def swings(curve: Sequence[Point]) -> Evidence | None:
    """Among the last 8 points at least two large rises and two large falls, by turns.

    >>> swings([Point(v) for v in (2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0)])
    {'swings': 7, 'median_swing': 1.0, 'level': 1.5}
    """
    points = curve[-_LOOKS_BACK:]
    if len(points) < _LOOKS_BACK:
        return None
    level = fmean(abs(point.value) for point in points)
    large = []
    for before, after in pairwise(points):
        step = after.value - before.value
        if abs(step) > max(_SWING * level, 5 * math.hypot(before.error, after.error)):
            large.append(step)
    turns = sum(a * b < 0 for a, b in pairwise(large))
    progress = abs(points[-1].value - points[0].value)
    if turns < 3 or sum(map(abs, large)) < 4 * progress:
        return None
    return {"swings": len(large), "median_swing": median(map(abs, large)), "level": level}


def _line(values: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    count, middle, mean = len(values), (len(values) - 1) / 2, fmean(values)
    spread = sum((x - middle) ** 2 for x in range(count))
    slope = sum((x - middle) * (y - mean) for x, y in enumerate(values)) / spread
    rest = sum((y - mean - slope * (x - middle)) ** 2 for x, y in enumerate(values))
    return slope, math.sqrt(rest / (count - 2) / spread) if count > 2 else math.inf


def _t(freedom: int) -> float:
    """Student's t at 99.5 %, to a few hundredths from 5 degrees of freedom on."""
    return 2.58 * (1 + 5.6 / freedom**1.5)


def _noise(values: Sequence[float]) -> float:
    """Standard deviation around a smooth curve, from second differences."""
    bends = [abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return median(bends) / (0.6745 * math.sqrt(6))
