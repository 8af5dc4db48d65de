"""Batches of as many rows as a budget of tokens holds, in the order in which a Trainer draws its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import pyarrow.compute
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler

from pipeline.errors import UserError
from pipeline.plan.batches import spread, take
from pipeline.plan.sizes import TOKENS


class TokenBatches(BatchRebalanceSampler):
    """This process's batches of each epoch.

    Every epoch has as many, for a Trainer counts its steps, and finds its place again, by those of the first: as many
    as the epoch that has most, and a whole number for each process. In an epoch with fewer the largest are halved.
    """

    # What is a BatchRebalanceSampler, transformers takes for batches and lets accelerate deal out no further.
    def __init__(self, rows: Any, tokens: list[int], args: Any) -> None:
        if isinstance(rows, RandomSampler):  # accelerate makes this of it where it is given rows and not batches
            rows = SeedableRandomSampler(data_source=rows.data_source, data_seed=args.seed)
        self.rows, self.tokens, self.budget = rows, tokens, int(getattr(args, TOKENS))
        self.processes, self.rank = max(1, args.world_size), args.process_index
        self.epoch = 0
        self.count = self._count(args)
        if self.count * self.processes > len(tokens):
            raise UserError(
                f"{TOKENS} {self.budget} makes batches of single rows, and {len(tokens)} rows cannot be divided "
                f"equally among {self.processes} processes: raise it, or start fewer processes"
            )

    def _count(self, args: Any) -> int:
        """Batches that each process takes of an epoch."""
        most = epoch = 0
        epochs = 1.0
        while epoch < epochs:
            most = max(most, math.ceil(len(self._take(epoch)) / self.processes))
            steps = math.ceil(most / args.gradient_accumulation_steps)
            epochs = float(args.max_steps / steps if args.max_steps > 0 else args.num_train_epochs)
            epoch += 1
        return most

    def _take(self, epoch: int) -> list[list[int]]:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
        return take(self.rows, self.tokens, self.budget)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        return iter(spread(self._take(self.epoch), self.count * self.processes)[self.rank :: self.processes])

    def heaviest(self) -> list[int]:
        """Of an epoch the batch that is most tokens with its padding."""
        return max(self._take(self.epoch), key=lambda batch: len(batch) * max(self.tokens[row] for row in batch))


def count_tokens(rows: Dataset) -> list[int]:
    """Of each row, of a pair those of both sequences; read from where the lists end, without the tokens."""
    prompts, answers = ("prompt_ids",), ("chosen_ids", "rejected_ids")
    parts = [*answers, *prompts, *prompts] if "chosen_ids" in rows.column_names else ["input_ids"]
    columns = rows.with_format("arrow")
    counts = sum(_lengths(columns, part) for part in parts if part in rows.column_names)
    return list(map(int, counts))  # type: ignore[arg-type]


def _lengths(columns: Dataset, name: str) -> numpy.ndarray[Any, Any]:
    return numpy.asarray(pyarrow.compute.list_value_length(columns.select_columns(name)[:][name]))
