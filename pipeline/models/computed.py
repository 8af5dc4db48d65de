"""How many tokens packing leaves to compute: counted in the trunk's forward passes, read once a logged step.

Activation checkpointing repeats layers, not the trunk, so what it computes again is not counted. Nor is sampling, whose
passes are not packed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Computed:
    """Tokens of the passes since `take` was last called."""

    real: int = 0
    """Of the batches, without padding."""
    computed: int = 0
    padded: int = 0
    """What the same batches are with their padding."""

    def add(self, real: int, computed: int, padded: int) -> None:
        self.real += real
        self.computed += computed
        self.padded += padded

    def take(self) -> dict[str, float]:
        """For each real token what was computed, and what a padded pass would have computed; counts anew from here."""
        real, computed, padded = self.real, self.computed, self.padded
        self.real = self.computed = self.padded = 0
        if not real:
            return {}
        return {"computed_per_token": computed / real, "padded_per_token": padded / real}


def take_computed(model: torch.nn.Module) -> dict[str, float]:
    """The figures of a model's trunk; none of one that is not packed."""
    found = _counted(model)
    return found.take() if found else {}


def is_packed(model: torch.nn.Module) -> bool:
    """Whether its trunk computes what rows begin with alike only once."""
    return _counted(model) is not None


def _counted(model: torch.nn.Module) -> Computed | None:
    counts = (vars(module).get("computed") for module in model.modules())
    return next((count for count in counts if isinstance(count, Computed)), None)
