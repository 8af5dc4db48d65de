"""A sweep over DPO's beta that trains pretrain and sft once: every fork shares what comes before it.

python recipes/sweep_beta.py [RECIPE] [BETA ...]
"""

from __future__ import annotations

import sys

from pipeline import read, run


def main(path: str = "recipes/quickstart.yaml", *betas: str) -> None:
    recipe = read(path)
    forks = {}
    for beta in betas or ("0.05", "0.1", "0.3"):
        name = "dpo-beta-" + beta.replace(".", "-")
        recipe = recipe.fork("dpo", name, f"train.beta={beta}")
        forks[beta] = name
    run(recipe, only=["pretrain", "sft", *forks.values()])
    for beta, name in forks.items():
        manifest = recipe.artifact(name).verify()
        before, after = (manifest[when]["preference_accuracy"] for when in ("before", "after"))
        print(f"beta {beta:>5}: held-out preference accuracy {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
