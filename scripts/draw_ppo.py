"""Draw the PPO curves of several runs of a recipe: mean score and KL of each step's answers, and what each function
among the sources of the reward says of them.

    python scripts/draw_ppo.py out.svg RUN_FOLDER... [--stage ppo]

Each folder is runs/<recipe> of one run; its line is named by the run's seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from pipeline.disk import metrics
from pipeline.disk.artifact import Artifact
from pipeline.report.figures import STYLE

PANELS = {"score": "mean score of a step's answers", "kl": "KL from the reference, nats an answer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("svg", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--stage", default="ppo")
    given = parser.parse_args()
    first = metrics.read(Artifact(given.runs[0] / given.stage).metrics)
    functions = {
        key: key.rpartition("/")[2] for row in first for key in row if key.startswith("score/") and ".py:" in key
    }
    panels = PANELS | functions
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
        for place, (key, title) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, len(panels), place)
            for run in given.runs:
                artifact = Artifact(run / given.stage)
                manifest = artifact.manifest()
                if manifest is None:
                    parser.error(f"{artifact.folder} has not finished")
                points = [(row["step"], row[key]) for row in metrics.read(artifact.metrics) if key in row]
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"seed {manifest.seed}")
            axes.set_title(title)
            axes.set_xlabel("PPO step")
        axes.legend()
        given.svg.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(given.svg, metadata={"Date": None})


if __name__ == "__main__":
    main()
