"""Whether the 95 % interval of Krippendorff's alpha covers the true alpha in 95 % of simulated studies. Takes minutes.

To use it:
    python scripts/agreement_coverage.py --studies 2000

People see the right value with probability r and otherwise pick one of k at random. Two of them agree beyond chance
with probability r * r, and that is alpha, nominal or ordinal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.measure.krippendorff import krippendorff


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    studies = parser.parse_args().studies
    rng = numpy.random.default_rng(5)
    for level, pairs, people, values, r in (
        ("nominal", 30, 2, 2, 0.7), ("nominal", 50, 2, 2, 0.7), ("nominal", 50, 3, 3, 0.8), ("nominal", 100, 2, 2, 0.5),
        ("nominal", 100, 3, 3, 0.9), ("nominal", 200, 2, 3, 0.6), ("nominal", 50, 2, 2, 0.98),
        ("ordinal", 50, 2, 4, 0.7), ("ordinal", 100, 3, 4, 0.8),
    ):  # fmt: skip
        covered = 0
        for _ in range(studies):
            right_P = rng.integers(values, size=(pairs, 1))
            seen_PA = numpy.where(rng.random((pairs, people)) < r, right_P, rng.integers(values, size=(pairs, people)))
            found = krippendorff(seen_PA.tolist(), level)
            covered += found is not None and found.low <= r * r <= found.high
        print(
            f"{pairs} pairs, {people} people, {values} values, alpha {r * r:.2f}: covered {covered / studies:.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
