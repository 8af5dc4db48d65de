"""What a stage that samples its answers is paid by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.errors import complaint
from pipeline.ppo.shipped import SHIPPED, Shipped

Finite = Annotated[float, Field(allow_inf_nan=False)]


class RewardTerm(BaseModel):
    """One source of a reward and how much it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    """A reward stage of the recipe, `path.py:function`, or a [function that comes with OneBase](rewards.md): `math`,
    `exact`, `fuzzy`, `json_schema`, `unit_tests`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    truth: bool = Field(default=False, strict=True)
    """Whether this function is the checked truth: it gives 1 for a right answer and 0 for a wrong one, nothing else.
    It may be paid or, with weight 0, only measured."""
    lower_bound: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How many deviations of a reward model's heads are taken from its score: what is paid is the lower bound of what
    the heads think an answer is worth. For a reward stage with `heads` above 1."""
    length_penalty: Literal["fitted"] | Finite = 0.0
    """What is taken from a reward model's score for each token of the answer. `fitted`: by how much its score grows
    with a token, told from the pairs it was trained on (a line through their margins against their lengths)."""

    @field_validator("length_penalty", mode="before")
    @classmethod
    def _is_a_number_or_fitted(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "fitted":
            raise complaint(f"is {given!r}, expected 'fitted' or a number")
        return given

    @property
    def file(self) -> str | None:
        """The Python file of a function of the user's; None for another source."""
        return self.source.rpartition(":")[0] if ".py:" in self.source else None

    @property
    def shipped(self) -> Shipped | None:
        """The function of this name that comes with OneBase; None for another source."""
        return SHIPPED.get(self.source)

    @property
    def is_stage(self) -> bool:
        """Whether it is a reward model."""
        return self.file is None and self.shipped is None
