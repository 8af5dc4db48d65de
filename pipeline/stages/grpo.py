"""Group relative policy optimization (arXiv 2402.03300): answers to a prompt, measured by each other."""

from __future__ import annotations

from typing import Literal

from pipeline.data.contracts import PROMPT_ONLY
from pipeline.ppo.grpo_settings import GRPOSettings
from pipeline.ppo.settings import CHECKPOINTS_KEPT
from pipeline.stages.ppo import HEADLINES, NUMBERS, RolloutSpec, encode, learn_from_answers
from pipeline.stages.stage import Context, Result, Stage


class GRPOSpec(RolloutSpec):
    kind: Literal["grpo"] = "grpo"
    config_class = GRPOSettings


def run(spec: GRPOSpec, ctx: Context) -> Result:
    from pipeline.ppo.grpo import GRPOTrainer

    return learn_from_answers(spec, ctx, GRPOTrainer)


STAGE = Stage(
    section=GRPOSpec,
    contract=PROMPT_ONLY,
    checkpoints=CHECKPOINTS_KEPT,
    raises="reward",
    headlines=HEADLINES,
    numbers=NUMBERS,
    encode=encode,
    run=run,
    learns="answers each prompt several times, and learns to answer as in its better attempts",
    colour="#8f3dc4",
)
