"""What `train:` of a GRPO stage may say. Plain Python: no torch.

Names are those of TRL's GRPOConfig where it has one. Where a default differs from TRL's, it says so.
Sources: [D] arXiv 2402.03300 (GRPO), [Dr] arXiv 2503.20783 (Dr. GRPO), [DA] arXiv 2503.14476 (DAPO),
[GS] arXiv 2507.18071 (GSPO), [R] arXiv 2402.14740 (RLOO), [H] arXiv 2403.17031 (implementation details).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.ppo.settings import RolloutSettings


class GRPOSettings(RolloutSettings):
    """What `train:` of a grpo stage may say."""

    word_of_length, word_of_kl_coef, word_of_penalty = "max_completion_length", "beta", "soft_punish_cache"

    # Amount of work
    max_steps: int = Field(default=100, ge=1)
    """Optimizer steps: each rollout is learnt from in num_iterations of them."""
    num_generations: int = Field(default=8, ge=2)
    """Answers to each prompt, G of [D]: a group."""
    generation_batch_size: int = Field(default=64, ge=2)
    """Answers of one rollout, over all processes: a multiple of num_generations. TRL's default is one forward pass. All
    of them make one optimizer step."""
    num_iterations: int = Field(default=1, ge=1)
    """Optimizer steps on each rollout, mu of [D, algorithm 1]."""

    # Rollout
    max_completion_length: int = Field(default=256, ge=1)
    """Most tokens of an answer."""
    max_num_gen_batches: int = Field(default=1, ge=1)
    """Dynamic sampling [DA, 3.2]: groups whose answers are all paid alike teach nothing. As long as there are such
    groups, they are replaced by groups for other prompts, in at most so many rounds of sampling. 1: no group is
    replaced. (The word of verl; TRL has none.)"""

    # Reward
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the deviation of their group [D], by that of the whole batch, or not at all [Dr]."""
    mask_truncated_completions: bool = False
    """Learn nothing from an answer that was cut at max_completion_length [DA, 3.4]."""
    soft_punish_cache: int | None = Field(default=None, ge=1)
    """Overlong penalty [DA, eq. 13]: within so many tokens below max_completion_length, an answer loses up to 1 of its
    reward, in proportion to its length. (Of TRL's reward function get_soft_overlong_punishment.)"""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty against the policy before this stage; 0 leaves it out, and its forward pass."""

    # Loss
    loss_type: Literal["grpo", "dr_grpo", "dapo", "gspo", "rloo"] = "dapo"
    """The mean over answers of each one's mean over tokens [D]; the sum over a constant [Dr]; the mean over all tokens
    [DA]; grpo with one ratio for each answer [GS]; or REINFORCE with the mean of the other answers as baseline, KL in
    the reward, and one ratio for each answer [R]."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """A ratio for each token, or one for each answer; gspo and rloo have the latter."""
    epsilon: float = Field(default=0.2, gt=0)
    """How far a ratio may fall below 1 [D, eq. 3]."""
    epsilon_high: float | None = Field(default=None, gt=0)
    """How far it may rise above 1 [DA, 3.1: 0.28]; epsilon if not given."""
    delta: float | None = Field(default=None, gt=1)
    """Bound of a ratio from above, whatever the advantage (arXiv 2505.07291, 3.4)."""

    # Optimizer
    learning_rate: float = Field(default=1e-6, ge=0)
    """Of the policy's adapter; adapters usually need ten times as much or more."""
    adam_epsilon: float = Field(default=1e-8, gt=0)

    # What PPO lets a recipe choose, and GRPO does not have
    critic: ClassVar[None] = None
    normalize_reward: ClassVar[Literal["none"]] = "none"
    kl_estimator: ClassVar[Literal["k1"]] = "k1"
    kl_target: ClassVar[None] = None
    kl_horizon: ClassVar[int] = 1
    early_stop_kl: ClassVar[None] = None
    value_learning_rate: ClassVar[None] = None
    vf_coef: ClassVar[float] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> GRPOSettings:
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size {self.generation_batch_size} is not a multiple of num_generations "
                f"{self.num_generations}: every answer is in one whole group"
            )
        if self.max_steps % self.num_iterations:
            raise ValueError(
                f"max_steps {self.max_steps} is not a multiple of num_iterations {self.num_iterations}: each rollout "
                "is learnt from so many times"
            )
        if self.max_length is not None and self.max_length <= self.max_completion_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no token for a prompt beside max_completion_length "
                f"{self.max_completion_length}"
            )
        if self.importance_sampling_level == "sequence" and self.loss_type in ("dapo", "dr_grpo"):
            raise ValueError(
                f"importance_sampling_level sequence and loss_type {self.loss_type} do not go together: one counts "
                "answers, the other tokens. Use loss_type gspo"
            )
        if self.soft_punish_cache is not None and self.soft_punish_cache > self.max_completion_length:
            raise ValueError(
                f"soft_punish_cache {self.soft_punish_cache} is more than max_completion_length "
                f"{self.max_completion_length}"
            )
        return self

    @property
    def steps(self) -> int:
        return self.max_steps // self.num_iterations

    @property
    def batch_size(self) -> int:
        return self.generation_batch_size

    @property
    def mini(self) -> int:
        return self.generation_batch_size

    @property
    def epochs(self) -> int:
        return self.num_iterations

    @property
    def response_length(self) -> int:
        return self.max_completion_length

    @property
    def scoring_passes(self) -> int:
        """Over an answer, besides those of reward models: by the reference, where there is one."""
        return int(self.beta > 0)

    @property
    def kl_coef(self) -> float:
        return self.beta

    @property
    def ratio_level(self) -> Literal["token", "sequence", "sum"]:
        """Over what a ratio is taken: a token, the mean or the sum of an answer's tokens."""
        if self.loss_type == "rloo":
            return "sum"
        return "sequence" if self.loss_type == "gspo" else self.importance_sampling_level
