"""Several sources as one stream of rows, as pretraining mixtures are given (say 60/22/8/8/3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray


def drawn(
    sizes: Sequence[int], weights: Sequence[float | None], epochs: Sequence[float], seed: int
) -> tuple[ndarray, ndarray, list[float]]:
    """Which source each row of the mixture comes from, its index there, and how often each source is passed over.

    sizes: rows of each source.  weights: share of the mixture's rows (as in table 2.2 of GPT-3, arXiv 2005.14165:
    the fraction of examples drawn from a source), or None for all: then each source is passed over `epochs` times.
    With weights the mixture is as long as it can be without passing over any source more than its `epochs` times.

    Every pass over a source is a new shuffle of it, the whole is shuffled once more, and all of it follows from `seed`.
    """
    import numpy

    if weights[0] is None:
        counts = [round(size * passes) for size, passes in zip(sizes, epochs, strict=True)]
    else:
        shares = [float(weight or 0) for weight in weights]
        longest = min(
            size * passes / (share / sum(shares)) for size, passes, share in zip(sizes, epochs, shares, strict=True)
        )
        counts = [round(longest * share / sum(shares)) for share in shares]
    which, index = [], []
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        generator = numpy.random.default_rng([seed, number])
        passes = -(-count // size) if size else 0
        order = [generator.permutation(size) for _ in range(passes)]
        index.append(numpy.concatenate(order)[:count] if order else numpy.empty(0, dtype=numpy.int64))
        which.append(numpy.full(len(index[-1]), number))
    all_which, all_index = numpy.concatenate(which), numpy.concatenate(index)
    shuffled = numpy.random.default_rng([seed, len(sizes)]).permutation(len(all_which))
    passed = [count / size if size else 0.0 for size, count in zip(sizes, counts, strict=True)]
    return all_which[shuffled], all_index[shuffled], passed
