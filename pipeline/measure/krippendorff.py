"""How far several people's values of the same things agree beyond chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy

from pipeline.measure import intervals
from pipeline.measure.metric import Estimate

Level = Literal["nominal", "ordinal"]
OVER_PAIRS = "bootstrap over pairs"


def krippendorff(units: Iterable[Sequence[Any]], level: Level) -> Estimate | None:
    """Krippendorff's alpha with its bootstrap interval over units: 1 is full agreement, 0 is that of chance.

    units: for each, the values that several people gave it; where fewer than two did, it does not count. None where
    fewer than two units are left, or all values are equal, so that nothing tells agreement from chance.

    Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    kept = [list(values) for values in units if len(values) > 1]
    names = sorted({value for values in kept for value in values})
    if len(kept) < 2 or len(names) < 2:
        return None
    places = {name: place for place, name in enumerate(names)}
    counts_UV = numpy.zeros((len(kept), len(names)))
    for unit, values in enumerate(kept):
        for value in values:
            counts_UV[unit, places[value]] += 1
    rng = numpy.random.default_rng(intervals.SEED)
    drawn_BU = rng.multinomial(len(kept), numpy.full(len(kept), 1 / len(kept)), intervals.RESAMPLES)
    observed_B, expected_B, largest_B = _disagreement(counts_UV, numpy.vstack([numpy.ones(len(kept)), drawn_BU]), level)
    # A draw whose values are all equal tells nothing.
    alpha_B = 1 - observed_B / numpy.where(expected_B > 0, expected_B, numpy.nan)
    low, high = numpy.nanpercentile(alpha_B[1:], [2.5, 97.5])
    if observed_B[0] == 0:  # a bootstrap would be certain; there may be as many unequal pairs as so few can miss
        missed = 1 - (intervals.share([1.0] * len(kept)).low or 0.0)
        low = 1 - missed * largest_B[0] / expected_B[0]
    return Estimate(float(alpha_B[0]), float(low), float(high), len(kept), OVER_PAIRS)


def _disagreement(counts_UV: Any, weights_BU: Any, level: Level) -> tuple[Any, Any, Any]:
    """For each weighting of the units (B,): observed, expected by chance, and the largest that two values can have."""
    others_U = counts_UV.sum(1) - 1
    alike_UVV = numpy.eye(counts_UV.shape[1]) * counts_UV[:, :, None]  # a value is not paired with itself
    pairs_UVV = (counts_UV[:, :, None] * counts_UV[:, None, :] - alike_UVV) / others_U[:, None, None]
    coincidences_BVV = numpy.einsum("bu,uvw->bvw", weights_BU, pairs_UVV)
    totals_BV = coincidences_BVV.sum(2)
    n_B = totals_BV.sum(1)
    if level == "nominal":
        distance_BVV = numpy.broadcast_to(1 - numpy.eye(counts_UV.shape[1]), coincidences_BVV.shape)
    else:
        middle_BV = totals_BV.cumsum(1) - totals_BV / 2  # between two values lie all others, and half of both
        distance_BVV = (middle_BV[:, :, None] - middle_BV[:, None, :]) ** 2
    observed_B = (coincidences_BVV * distance_BVV).sum((1, 2)) / n_B
    expected_B = (totals_BV[:, :, None] * totals_BV[:, None, :] * distance_BVV).sum((1, 2)) / (n_B * (n_B - 1))
    return observed_B, expected_B, distance_BVV.max((1, 2))
