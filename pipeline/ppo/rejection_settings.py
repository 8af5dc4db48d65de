"""What `sampling:` of a rejection_sampling stage may say. Plain Python: no torch.

Names are those of TRL's GRPOConfig where it has one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RejectionSettings(BaseModel):
    """How answers are sampled, and which of them are kept."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    num_generations: int = Field(default=8, ge=1)
    """Answers sampled to each prompt."""
    max_completion_length: int = Field(default=256, ge=1)
    """Most tokens of an answer. An answer that is cut there is not kept."""
    temperature: float = Field(default=1.0, ge=0.01)
    """Of sampling."""
    keep: Literal["best", "passed"] = "best"
    """The best answer to each prompt, or all that reach `threshold`. Of several that are equally good, best is the
    first. Equal answers to a prompt are kept once."""
    threshold: float | None = None
    """The least reward of an answer that is kept. With `keep: passed` it must be given. With `keep: best` and no
    threshold, the best answer is kept however bad it is."""
    generation_batch_size: int = Field(default=64, ge=1)
    """Answers sampled at once, over all processes: a multiple of num_generations."""
    dequantize_rollout: bool = False
    """Sample from a dequantised copy of the weights with the policy's adapter added (2 bytes a parameter, only while it
    samples)."""
    cache_implementation: Literal["static"] | None = None
    """static: sample with keys and values at their full size from the start, and on a GPU by a compiled step. Its gain
    on a GPU is not measured; on a CPU it is slower."""

    # What PPO lets a recipe choose, and this stage does not have
    critic: ClassVar[None] = None
    rollout_batch_size: ClassVar[None] = None
    max_tool_calling_iterations: ClassVar[None] = None
    tool_timeout: ClassVar[float] = 10.0

    @model_validator(mode="after")
    def _fits(self) -> RejectionSettings:
        if self.keep == "passed" and self.threshold is None:
            raise ValueError("keep: passed needs a threshold: the least reward of an answer that is kept")
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size {self.generation_batch_size} is not a multiple of num_generations "
                f"{self.num_generations}: all answers to a prompt are sampled together"
            )
        return self

    @property
    def scoring_passes(self) -> int:
        """Over an answer, besides those of reward models."""
        return 0

    @property
    def batch_size(self) -> int:
        return self.generation_batch_size

    @property
    def response_length(self) -> int:
        return self.max_completion_length
