"""What `train:` of a PPO stage may say, and of others that learn from their own answers. Plain Python: no torch.

Names are those of TRL's former PPOTrainer where it had one, and of transformers' TrainingArguments for the optimizer.
Sources: [S] arXiv 1707.06347 (PPO), [Z] arXiv 1909.08593 (Ziegler et al.), [I] arXiv 2203.02155 (InstructGPT),
[H] arXiv 2403.17031 (implementation details of RLHF with PPO), [G] arXiv 1506.02438 (GAE),
[K] joschu.net/blog/kl-approx.html (estimators of KL).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

CHECKPOINTS_KEPT = 2
"""Unless save_total_limit says otherwise: the newest may hold an update that only the next rollout shows to be bad."""


class Sampling(Protocol):
    """How a stage samples answers, whatever it calls it."""

    @property
    def batch_size(self) -> int:
        """Answers of one round, over all processes."""

    @property
    def response_length(self) -> int:
        """Most tokens of an answer."""

    @property
    def temperature(self) -> float: ...
    @property
    def rollout_batch_size(self) -> int | None:
        """Answers sampled at once in a process; all of its share if None."""

    @property
    def dequantize_rollout(self) -> bool: ...
    @property
    def cache_implementation(self) -> Literal["static"] | None: ...
    @property
    def num_generations(self) -> int: ...
    @property
    def scoring_passes(self) -> int: ...
    @property
    def critic(self) -> Literal["adapter", "trunk"] | None: ...
    @property
    def max_tool_calling_iterations(self) -> int | None: ...
    @property
    def tool_timeout(self) -> float: ...


class RolloutSettings(BaseModel):
    """What stages that learn from their own answers have in common. Raises ValidationError naming the argument whose
    value makes no sense."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    word_of_length: ClassVar[str]
    """What a recipe calls response_length here; below, kl_coef, and what makes cut answers lose reward."""
    word_of_kl_coef: ClassVar[str]
    word_of_penalty: ClassVar[str]
    if TYPE_CHECKING:  # what each of them says in its own words

        @property
        def steps(self) -> int: ...
        @property
        def batch_size(self) -> int: ...
        @property
        def mini(self) -> int: ...
        @property
        def epochs(self) -> int: ...
        @property
        def response_length(self) -> int: ...
        @property
        def kl_coef(self) -> float: ...
        @property
        def kl_estimator(self) -> Literal["k1", "k3"]: ...
        @property
        def kl_target(self) -> float | None: ...
        @property
        def kl_horizon(self) -> int: ...
        @property
        def normalize_reward(self) -> Literal["start", "running", "none"]: ...
        @property
        def early_stop_kl(self) -> float | None: ...
        @property
        def num_generations(self) -> int: ...
        @property
        def scoring_passes(self) -> int: ...
        @property
        def critic(self) -> Literal["adapter", "trunk"] | None: ...
        @property
        def vf_coef(self) -> float: ...
        @property
        def learning_rate(self) -> float: ...
        @property
        def value_learning_rate(self) -> float | None: ...
        @property
        def adam_epsilon(self) -> float: ...

    # Amount of work
    per_device_train_batch_size: int = Field(default=8, ge=1)
    """Episodes of one forward pass. Changes memory and speed; the gradient is the same up to rounding."""

    # Rollout
    max_length: int | None = Field(default=None, ge=1)
    """Most tokens of prompt and answer together; a longer prompt is an error. The base's window if not given."""
    temperature: float = Field(default=1.0, ge=0.01)
    """Of sampling, and of every log-probability: both must speak of the same distribution."""
    rollout_batch_size: int | None = Field(default=None, ge=1)
    """Episodes sampled at once in a process; all of its share if not given."""
    dequantize_rollout: bool = False
    """Sample from a dequantised copy of the weights with the policy's adapter added (2 bytes a parameter, only while it
    samples). What is learnt from is computed by the 4-bit model with its adapter all the same."""
    cache_implementation: Literal["static"] | None = None
    """static: sample with keys and values at their full size from the start, and on a GPU by a compiled step. Answers
    that have ended stay in the batch. Its gain on a GPU is not measured; on a CPU it is slower. (Of TRL's
    GRPOConfig.)"""

    # Tools
    max_tool_calling_iterations: int | None = Field(default=None, ge=1)
    """With an environment: most turns of an answer after which tools are run; as many as the answer has room for if not
    given. (TRL's name.)"""
    tool_timeout: float = Field(default=10.0, gt=0)
    """Seconds that a tool may take; one that takes longer stops the run."""

    # Keeping what earlier stages taught
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the loss on demonstrations that every update adds to its own, so that the policy keeps them (PPO-ptx
    [I, eq. 2]). They are the training rows of the nearest sft stage that the policy comes from, as many in an update as
    it has episodes; the loss is the mean over their supervised tokens, at temperature 1."""
    pretraining_coef: float = Field(default=0.0, ge=0)
    """The same for documents of the nearest pretrain stage, in pieces of at most its max_length. In [I] it is 27.8."""

    # Correction, where an engine samples
    vllm_importance_sampling_correction: bool = True
    """Where an engine samples (`rollout:`), multiply each token's loss by how much likelier the model itself would have
    been to write it. The critic's loss is not corrected."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """By the ratio of each token, or of its whole answer; a ratio beyond the bounds counts as the bound (truncate), or
    as 0 (mask)."""
    vllm_importance_sampling_clip_max: float | None = Field(default=3.0, gt=0)
    """Upper bound of that ratio."""
    vllm_importance_sampling_clip_min: float | None = Field(default=None, ge=0)
    """Lower bound of that ratio."""

    # Optimizer
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 over all steps [H, detail 15]."""
    warmup_steps: float = Field(default=0, ge=0)
    """Steps of rising rate: a count, or a share below 1."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Of policy and critic, each by itself."""
    gradient_checkpointing: bool = True
    activation_checkpointing: bool | int | None = Field(default=None, ge=0)
    """The same by its newer name, which counts if given: true, false, or in how many layers, the first ones."""

    # Health
    kl_stop: float = Field(default=50.0, gt=0)
    """Nats per answer at which the run is stopped: the policy has left what the reward model knows."""

    # Seen, not learnt
    logging_steps: float = Field(default=1, ge=0)
    save_steps: int = Field(default=10, ge=0)
    save_total_limit: int | None = Field(default=None, ge=1)
    report_to: str | list[str] | None = "none"
    """Trackers that are told of the training (docs/trackers.md)."""
    project: str | None = None
    """Of the trackers; the recipe's name if not given."""
    run_name: str | None = None
    """The stage's name if not given; something unique is put after it."""
    trackio_space_id: str | None = None
    """A Space on the Hub that trackio sends to; it keeps to this machine if not given."""

    @property
    def kept_coefs(self) -> dict[str, float]:
        """The weight of the loss on rows of earlier stages, by their kind, of those that are learnt again."""
        coefs = {"sft": self.sft_coef, "pretrain": self.pretraining_coef}
        return {kind: coef for kind, coef in coefs.items() if coef}

    @property
    def checkpointing(self) -> bool | int:
        """Whether, or in how many layers, activations are computed again."""
        return self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing

    def learning_rate_factor(self, step: int) -> float:
        """The share of learning_rate at a step counted from 0: warm-up, then decay."""
        warmup = self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * self.steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.lr_scheduler_type == "constant":
            return 1.0
        done = (step - warmup) / max(self.steps - warmup, 1)
        return 1.0 - done if self.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done))


class PPOSettings(RolloutSettings):
    """What `train:` of a ppo stage may say."""

    word_of_length, word_of_kl_coef, word_of_penalty = "response_length", "kl_coef", "missing_eos_penalty"

    # Amount of work
    steps: int = Field(default=100, ge=1)
    """Rollouts, each followed by an update."""
    batch_size: int = Field(default=32, ge=1)
    """Episodes of one step, over all processes."""
    mini_batch_size: int | None = Field(default=None, ge=1)
    """Episodes of one optimizer step, over all processes; the whole batch if not given."""
    num_ppo_epochs: int = Field(default=2, ge=1)
    """Passes over a batch [S, algorithm 1]."""

    # Rollout
    response_length: int = Field(default=64, ge=1)
    """Most tokens of an answer."""

    # Reward
    normalize_reward: Literal["start", "running", "none"] = "start"
    """Shift and scale scores to mean 0 and deviation 1 of the first batch, which SFT's own policy wrote [I, 3.5; H,
    detail 12]; or of all scores so far."""
    reward_clip: float | None = Field(default=None, gt=0)
    """Bound of a normalised score."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken from the normalised score of an answer that was cut at response_length [H, detail 8]."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Weight of the per-token KL penalty against the policy before this stage [Z, eq. 2]."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Of a token's KL: log-ratio, or the always positive k3 [K]."""
    kl_target: float | None = Field(default=None, gt=0)
    """Nats per answer that an adaptive kl_coef steers to [Z, 2.2]; the coefficient is fixed if not given."""
    kl_horizon: int = Field(default=2000, ge=1)
    """Episodes over which the adaptive coefficient reacts [Z, 2.2]."""

    # Advantage
    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of GAE [G, eq. 16]."""
    whiten_advantages: bool = True
    """Mean 0 and variance 1 over all tokens of a batch [H, detail 18]."""

    # Loss
    cliprange: float = Field(default=0.2, gt=0)
    """epsilon of the clipped ratio [S, eq. 7]."""
    cliprange_value: float = Field(default=0.2, gt=0)
    """How far a value may move from its value at rollout [H, detail 17]."""
    vf_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss; of importance where critic is trunk, as both losses move one adapter."""
    loss_normalization: Literal["token", "sequence"] = "token"
    """Mean over all tokens of a minibatch, or over answers of each answer's mean."""
    early_stop_kl: float | None = Field(default=None, gt=0)
    """End a batch's update once the policy has moved so far (k3, nats a token) from the one that wrote it; 1.5 times a
    target of 0.01 is usual."""

    # Critic
    critic: Literal["adapter", "trunk"] = "trunk"
    """A head on the policy's trunk, or an adapter of its own that starts as the reward model [I, C.4]. The trunk is the
    default by measurement (docs/measurements-speed.md): half the passes of an update, less memory, and it learns no
    worse."""
    value_learning_rate: float | None = Field(default=None, ge=0)
    """Of the critic; learning_rate if not given."""

    # Optimizer
    learning_rate: float = Field(default=3e-6, ge=0)
    adam_epsilon: float = Field(default=1e-5, gt=0)
    """1e-5 as in the original, not 1e-8 [H, detail 14]."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> PPOSettings:
        if self.batch_size % self.mini:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of mini_batch_size {self.mini}: every episode of a "
                "batch is in exactly one minibatch of an epoch"
            )
        if self.max_length is not None and self.max_length <= self.response_length:
            raise ValueError(
                f"max_length {self.max_length} leaves no token for a prompt beside response_length "
                f"{self.response_length}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_target steers by multiplying kl_coef, and 0 stays 0: set kl_coef above 0, for example 0.05"
            )
        if self.kl_target is not None and self.kl_horizon < self.batch_size:
            raise ValueError(f"kl_horizon {self.kl_horizon} is less than one batch ({self.batch_size} episodes)")
        return self

    @property
    def mini(self) -> int:
        return self.mini_batch_size or self.batch_size

    @property
    def epochs(self) -> int:
        return self.num_ppo_epochs

    @property
    def num_generations(self) -> int:
        """One answer to each prompt."""
        return 1

    @property
    def one_minibatch(self) -> bool:
        """Whether a batch is learnt from in one optimizer step an epoch."""
        return self.mini == self.batch_size

    @property
    def scoring_passes(self) -> int:
        """Passes over an answer before it is learnt from, besides those of reward models: by the reference, and by the
        policy and the critic where the sampler has not noted what they say."""
        return 1 + (not self.one_minibatch) + (self.critic == "adapter")
