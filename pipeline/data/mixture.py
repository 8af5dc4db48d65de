"""Several sources as one stream of rows, as pretraining mixtures are given (say 60/22/8/8/3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


def draw(
    sizes: Sequence[int], weights: Sequence[float | None], epochs: Sequence[float], seed: int
) -> tuple[ndarray, ndarray]:
    """Which source each row of the mixture comes from, and its index there.

    sizes: rows of each source.  weights: share of the mixture's rows (as in table 2.2 of GPT-3, arXiv 2005.14165:
    the fraction of examples drawn from a source), or None for all: then each source is passed over `epochs` times.
    With weights the mixture is as long as it can be without passing over any source more than its `epochs` times.

    Every pass over a source is a new shuffle of it, the whole is shuffled once more, and all of it follows from `seed`.
    """
    import numpy

    at_most = [size * passes for size, passes in zip(sizes, epochs, strict=True)]
    if weights[0] is None:
        counts = [round(rows) for rows in at_most]
    else:
        shares = [float(weight or 0) for weight in weights]
        length = min(rows / (share / sum(shares)) for rows, share in zip(at_most, shares, strict=True))
        counts = [round(length * share / sum(shares)) for share in shares]
    index = [numpy.empty(0, dtype=numpy.int64)]
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        generator = numpy.random.default_rng([seed, number])
        index += [generator.permutation(size)[: count - start] for start in range(0, count, max(1, size))]
    which = numpy.repeat(numpy.arange(len(sizes)), counts)
    order = numpy.random.default_rng([seed, len(sizes)]).permutation(len(which))
    return which[order], numpy.concatenate(index)[order]
