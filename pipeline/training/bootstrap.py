"""Several score heads on one trunk, each learning a bootstrap of its own of the pairs.

Heads that start from different draws and weigh the pairs differently agree where the pairs leave no choice and differ
elsewhere (arXiv 1602.04621, section 3; ensembles of reward models: 2310.02743, 2312.09244). In place of drawing pairs
with replacement, how often a head draws a pair is drawn itself, from Poisson(1) (Oza and Russell 2001).
"""

from __future__ import annotations

from typing import Any

import numpy
import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from trl.trainer.reward_trainer import DataCollatorForPreference

from pipeline.training.micro_batches import Trainer

WEIGHTS = "head_weights"


def draw_weights(pairs: Dataset, heads: int, seed: int) -> Dataset:
    """The pairs with how often each head draws each of them, a column of lists. A pair that no head draws is drawn
    again, so that every row is learnt from."""
    draw = numpy.random.default_rng(seed)
    weights_PK = draw.poisson(1.0, (len(pairs), heads))
    while len(unseen := numpy.flatnonzero(weights_PK.sum(1) == 0)):
        weights_PK[unseen] = draw.poisson(1.0, (len(unseen), heads))
    return pairs.add_column(WEIGHTS, weights_PK.tolist())


class WeighedPairs(DataCollatorForPreference):
    """TRL's batch of pairs with the heads' weights (B, K)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        weights_BK = torch.tensor([row[WEIGHTS] for row in examples], dtype=torch.float32)
        return {**super().torch_call(examples), WEIGHTS: weights_BK}


class LearnsByHeads(Trainer):  # type: ignore[misc]
    """For RewardTrainer and a model of K scores: its loss for each pair and head, times how often the head draws the
    pair; the mean over all. Its other figures are means over the heads, none of them weighed."""

    def __init__(self, model: Any, **options: Any) -> None:
        config, heads = model.config, model.config.num_labels
        config.num_labels = 1  # TRL 1.16 takes no other model; what it computes of one score it computes of several
        try:
            super().__init__(model=model, **options)
        finally:
            config.num_labels = heads

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: list[str] = [*dict.fromkeys([*self._signature_columns, WEIGHTS])]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights_BK = inputs[WEIGHTS]
        rest = {name: value for name, value in inputs.items() if name != WEIGHTS}
        _, outputs = super().compute_loss(model, rest, True, num_items_in_batch)
        chosen_BK, rejected_BK = outputs.logits.chunk(2)
        losses_BK = -logsigmoid(chosen_BK - rejected_BK)
        if self.args.center_rewards_coefficient is not None:
            losses_BK = losses_BK + self.args.center_rewards_coefficient * (chosen_BK + rejected_BK) ** 2
        loss = (weights_BK * losses_BK).mean()
        return (loss, outputs) if return_outputs else loss
