"""A Trainer that survives out of memory: the micro-batch is halved, the optimizer step is the one it would have been.

Gradients of a batch are sums over its rows, so a batch done in parts, each weighed by its share, gives the same
gradients up to the order of a sum. What a part had added when memory ran out is thrown away: the gradients of the
micro-batches before it are kept aside until the pass is through.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pyarrow.compute
import torch
from datasets import Dataset

from pipeline.errors import UserError
from pipeline.models.forward import checkpoint_first
from pipeline.models.out_of_memory import CHECKPOINT, WhenSplit, does_not_fit, gradients_aside, halve, is_out_of_memory
from pipeline.plan.auto import STEP, find_longest
from pipeline.plan.memory import Model
from pipeline.plan.shapes import Adapter, shapes_of
from pipeline.plan.sizes import BATCH, TOKENS
from pipeline.plan.stage import attention, checkpointed_layers, optimizer_bytes
from pipeline.plan.work import Work

Batch = dict[str, Any]
Trainer: Any = object
"""What a class that goes ahead of one of TRL's trainers inherits from; the trainer comes after it."""
COMPARES_PAIRS = {"aot", "aot_unpaired"}
"""DPO's losses that sort the pairs of a batch: of a part they are another loss."""


class SplitsWhenFull(Trainer):  # type: ignore[misc]
    """For SFTTrainer, RewardTrainer, DPOTrainer and KTOTrainer, ahead of them in the order of classes.

    Also checkpoints activations in the first layers only, where `activation_checkpointing` is a number.
    """

    rows_at_once: int | None = None
    """Rows (pairs, or sequences of a packed batch) of one forward pass, once a batch has been found too large."""
    probes = torch.cuda.is_available()
    """Whether the longest batch is tried before the first step. A CPU does not say that it is full."""
    when_split: WhenSplit = staticmethod(lambda rows, left: None)
    when_tried: Callable[[int], None] = staticmethod(lambda rows: None)
    """Called with the rows that are tried again after `patience`."""
    patience = 100
    """Steps after which twice as many rows are tried again: what was full may have been so for a moment. Each time that
    they do not fit it is doubled, so that the passes lost are few."""
    _metrics: Any
    _total_train_tokens: Any
    _share = 1.0
    _usual: tuple[float, float] | None = None
    """Of batches by tokens, which differ in rows: what a batch of this optimizer step weighs on average, as `_weight`
    and `_chosen` have it. A mean over a batch then counts by its rows, and every row the same."""
    _probed = False
    _most, _since, _tried = 0, 0, False

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.probes and not self._probed:
            self._probe(model)
        self._probed = True
        self._try_more()
        return self._in_parts(model, inputs, num_items_in_batch)

    def get_batch_samples(self, *args: Any) -> tuple[list[Batch], Any]:
        batches, items = super().get_batch_samples(*args)
        if batches and getattr(self.args, TOKENS, None):
            self._usual = sum(map(_weight, batches)) / len(batches), sum(map(_chosen, batches)) / len(batches)
        return batches, items

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return result[0] * self._share, *result[1:]
        return result * self._share

    def _in_parts(self, model: Any, inputs: Batch, num_items: Any) -> torch.Tensor:
        """Forward and backward of a batch, whole or in as many parts as memory asks for; its loss.

        Raises UserError where a batch of this loss cannot be done in parts, or one row does not fit.
        """
        count = rows(inputs)
        metrics, tokens = self._metrics, self._total_train_tokens
        weights = list(getattr(self, "loss_weights", ()))
        # Of several processes DDP averages what has accumulated by the last micro-batch: it must all be there.
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        alone = self.accelerator.num_processes == 1

        def step(size: int) -> torch.Tensor:
            self._metrics, self._total_train_tokens = copy.deepcopy(metrics), tokens
            losses = []
            try:
                with gradients_aside(trained) if alone else contextlib.nullcontext():
                    for start in range(0, count, size):
                        some = part(inputs, start, min(start + size, count))
                        # A sum over tokens, divided by all of the step's, needs no weight; a mean over a part does.
                        self._share = 1.0 if num_items is not None else self._share_of(some, inputs)
                        if "sft" in getattr(self, "loss_types", ()):
                            self.loss_weights = self._by_tokens(weights, some, inputs)
                        if self.args.checkpointed_layers:  # TRL's DPO trainer has turned it on for all by then
                            checkpoint_first(model, self.args.checkpointed_layers)
                        losses.append(super(SplitsWhenFull, self).training_step(model, some, num_items))
                return torch.stack(losses).sum()
            except RuntimeError as error:
                if is_out_of_memory(error) and (why := self._why_whole()):
                    raise UserError(
                        f"out of memory with {size} rows at once, which cannot be done in parts: {why}. Halve "
                        f"{TOKENS if getattr(self.args, TOKENS, None) else BATCH} and double "
                        "gradient_accumulation_steps, lower max_length"
                        + ("." if self._checkpointed(1) else f"{CHECKPOINT}.")
                    ) from error
                raise
            finally:
                self._share = 1.0
                if weights:
                    self.loss_weights = weights

        return halve(step, min(count, self.rows_at_once or count), lambda: self._too_long(inputs), self._split)

    def _share_of(self, some: Batch, whole: Batch) -> float:
        """How much the mean over a part of a batch counts in that over the batch, or in an average one of the step."""
        usual = self._usual[0] if self._usual else _weight(whole)
        return _weight(some) / usual if usual else 1.0

    def _split(self, size: int, left: int) -> None:
        self.patience *= 2 if self._tried else 1
        self._most, self._since, self._tried = max(self._most, size), self.state.global_step, False
        self.rows_at_once = left
        self.when_split(size, left)

    def _try_more(self) -> None:
        if self.rows_at_once is None or self.state.global_step - self._since < self.patience:
            return
        more = self.rows_at_once * 2
        self.rows_at_once = more if more < self._most else None
        self._since, self._tried = self.state.global_step, True
        self.when_tried(min(more, self._most))

    def _by_tokens(self, weights: list[float], some: Batch, whole: Batch) -> list[float]:
        """DPO's weights of its losses for a part: `sft` is a mean over the chosen answers' tokens, not over pairs."""
        share = _chosen(some) / (self._usual[1] if self._usual else _chosen(whole)) / self._share
        return [
            weight * share if loss == "sft" else weight for loss, weight in zip(self.loss_types, weights, strict=True)
        ]

    def _probe(self, model: Any) -> None:
        """Try the longest rows as one batch, so that what does not fit is found before the first step."""
        longest: Any = self._get_train_sampler().heaviest() if getattr(self.args, TOKENS, None) else self._longest()
        room = self._room_for_later(model)
        metrics, tokens = copy.deepcopy(self._metrics), self._total_train_tokens
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            self._in_parts(model, self.data_collator([self.train_dataset[int(i)] for i in longest]), None)
        del room
        self._metrics, self._total_train_tokens = metrics, tokens
        model.zero_grad()

    def _longest(self) -> numpy.ndarray[Any, Any]:
        return numpy.argsort(lengths(self.train_dataset), kind="stable")[-self.args.per_device_train_batch_size :]

    def _room_for_later(self, model: Any) -> list[torch.Tensor]:
        """As much memory as the steps will take for good: the optimizer's state, which its first step makes, and the
        gradients that are kept aside while a further micro-batch is done."""
        state = 0.0 if getattr(self.optimizer, "state", None) else optimizer_bytes(self.args.optim)
        aside = 4 if self.args.gradient_accumulation_steps > 1 and self.accelerator.num_processes == 1 else 0
        return [
            torch.empty(int(weight.numel() * (state + aside)), dtype=torch.uint8, device=weight.device)
            for weight in model.parameters()
            if weight.requires_grad
        ]

    def _why_whole(self) -> str | None:
        """Why a batch cannot be done in parts that add up to it, where it cannot."""
        losses = set(getattr(self, "loss_types", ()))
        if self.accelerator.num_processes > 1:
            return "the other processes wait for this one's gradients"
        if sorting := sorted(losses & COMPARES_PAIRS):
            return f"loss_type {sorting[0]} compares all pairs of a batch with each other"
        if getattr(self, "calculate_KL", False):
            return "loss_type kto estimates its KL term from all rows of a batch"
        if "sft" in losses and self.use_weighting:
            return "use_weighting multiplies a mean over tokens (loss_type sft) by one over pairs"
        if getattr(self.args, "activation_offloading", False):
            return "TRL's activation_offloading has no way to drop what it moved to RAM in a pass that broke off"
        if getattr(self, "aux_loss_enabled", False):
            return (
                "the router's loss of a mixture of experts is computed over the whole batch (router_aux_loss_coef: 0 "
                "ends it)"
            )
        if self.args.neftune_noise_alpha and getattr(self, "padding_free", False):
            return "neftune_noise_alpha scales its noise with the length of the packed row"
        return None

    def _checkpointed(self, layers: int) -> int:
        """How many of a model's layers checkpoint their activations."""
        return self.args.checkpointed_layers or checkpointed_layers(vars(self.args), layers)

    def _too_long(self, inputs: Batch) -> str:
        length = inputs["input_ids"].shape[-1]
        fits = self._longest_that_fits(length, 1 + _pairs(inputs)) or max(1, length // 2)
        return does_not_fit(length, f". Lower max_length to {fits}{'' if self._checkpointed(1) else CHECKPOINT}")

    def _longest_that_fits(self, length: int, sequences: int) -> int | None:
        """Tokens of one row, of so many sequences and shorter than `length`, that the planner finds room for on this
        GPU. None where there is no GPU, or the planner does not know the architecture."""
        model, args = self.model, self.args
        if not torch.cuda.is_available():
            return None
        try:
            shapes = shapes_of(model.config.get_text_config().to_dict())
        except UserError:
            return None
        lora = model.peft_config["default"]
        reference = "ref" in model.peft_config  # as DPOTrainer names it
        work = Work(
            sequences,
            length,
            self._checkpointed(shapes.layers),
            **attention(model.config._attn_implementation),
            accumulates=args.gradient_accumulation_steps > 1,
            optimizer_bytes=optimizer_bytes(args.optim),
            frozen=len(model.peft_config) - 1,
            score_head=lora.task_type == "SEQ_CLS",
            reference=reference,
            evaluates=False,
        )
        width = model.get_input_embeddings().weight.dtype.itemsize
        planned = Model(shapes, Adapter(lora.r, lora.lora_dropout), getattr(model, "is_loaded_in_4bit", False), width)
        room = torch.cuda.get_device_properties(model.device).total_memory
        longest = length - 1
        return find_longest(planned, lambda tokens: replace(work, length=tokens), longest, min(STEP, longest), room)


def _pairs(inputs: Batch) -> bool:
    """DPO's and the reward trainer's batches hold all chosen rows, then all rejected ones."""
    return not inputs.keys() & {"labels", "label"}


def rows(inputs: Batch) -> int:
    """Rows of a batch; pairs where it holds chosen and rejected ones, sequences where they are packed in one row."""
    if "cu_seq_lens_q" in inputs:
        return len(inputs["cu_seq_lens_q"]) - 1
    count = len(inputs["input_ids"])
    return count // 2 if _pairs(inputs) else count


def _weight(inputs: Batch) -> int:
    """What a batch's mean is over: pairs, answers with a label, or tokens with one."""
    return int((inputs["labels"][..., 1:] != -100).sum()) if "labels" in inputs else rows(inputs)


def _chosen(inputs: Batch) -> int:
    """Tokens of the chosen answers, of DPO's batches; else nothing."""
    return int(inputs["completion_mask"].chunk(2)[0][:, 1:].sum()) if "completion_mask" in inputs else 0


def part(inputs: Batch, start: int, stop: int) -> Batch:
    """The rows (pairs, packed sequences) of a batch from `start` to before `stop`, under the padding they have."""
    count = rows(inputs)
    if (start, stop) == (0, count):
        return dict(inputs)
    if "cu_seq_lens_q" in inputs:
        return _part_of_packed(inputs, start, stop)

    def of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if _pairs(inputs) and len(value) == 2 * count:
            return torch.cat([half[start:stop] for half in value.chunk(2)])
        return value[start:stop]

    return {name: of(value) for name, value in inputs.items()}


def _part_of_packed(inputs: Batch, start: int, stop: int) -> Batch:
    """Some of the sequences that lie end to end in one row. Their first tokens carry no label, so nothing is lost."""
    ends = inputs["cu_seq_lens_q"]
    first, last = int(ends[start]), int(ends[stop])
    bounds = (ends[start : stop + 1] - first).to(ends.dtype)
    along = ("input_ids", "labels", "position_ids", "attention_mask", "seq_idx")
    some = {name: value[:, first:last] if name in along else value for name, value in inputs.items()}
    if "seq_idx" in some:
        some["seq_idx"] = some["seq_idx"] - start
    some["cu_seq_lens_q"] = some["cu_seq_lens_k"] = bounds
    some["max_length_q"] = some["max_length_k"] = int(bounds.diff().max())
    return some


def lengths(rows: Dataset) -> numpy.ndarray[Any, Any]:
    """Tokens of each row (R,), without reading the tokens: from the column that says so, or where the lists end."""
    if "length" in rows.column_names:
        return numpy.asarray(rows.with_format("numpy")["length"][:])
    ids = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return numpy.asarray(pyarrow.compute.list_value_length(ids))
