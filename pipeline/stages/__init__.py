"""The stages there are. A new one is one file and one line here."""

from pipeline.stages import classify, dpo, grpo, kto, ppo, pretrain, rejection_sampling, reward, sft
from pipeline.stages.stage import Stage

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        *(pretrain.STAGE, sft.STAGE, classify.STAGE, reward.STAGE, dpo.STAGE, kto.STAGE, ppo.STAGE, grpo.STAGE),
        rejection_sampling.STAGE,
    )
}
