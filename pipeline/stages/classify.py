"""Text classification: a score head of one output a class on the policy's trunk, learnt from texts with labels.

Beside it the same texts are judged without a head, by the likelihood of each label's own words after an instruction,
and by a bag of words: so one sees whether the head was worth it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from pipeline.data import render
from pipeline.data.contracts import LANGUAGE_MODELING, Contract, Row
from pipeline.data.load import DataSpec
from pipeline.data.tokens import tokenize_text
from pipeline.errors import UserError, complaint
from pipeline.measure.metric import Metric
from pipeline.stages.stage import Context, Result, Stage, StageSpec

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.training.sequences import Tally

MACRO_F1 = Metric("macro_f1", "macro F1")
ACCURACY = Metric("accuracy", "texts classified right", unit="%")
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Item = tuple[list[int], list[int]]
"""Token ids of a text; for each class 1 if the text is of it, else 0."""


def _check_row(row: Row) -> str | None:
    labels = row.get("label")
    labels = labels if isinstance(labels, list) else [labels]
    if "label" not in row:
        return "has no field 'label'"
    if any(isinstance(label, bool) or not isinstance(label, str | int) or label == "" for label in labels):
        return f"field 'label' is {row['label']!r:.40}, expected a text, a whole number, or a list of these"
    return LANGUAGE_MODELING.check(row)


LABELLED_TEXT = Contract("text with its label", "text", '{"text": "...", "label": "..."}', _check_row)


class ClassifySpec(StageSpec):
    kind: Literal["classify"] = "classify"
    config_class = "RewardConfig"  # transformers' arguments with max_length, and TRL's defaults for a new head
    labels: list[str] | None = Field(default=None, min_length=2)
    """The classes in the order of the head's outputs; those of the training rows, sorted, unless named. A row that
    gives a number means the class at that place, counted from 0."""
    class_weights: str | dict[str, Weight] | None = None
    """How much a class counts in the loss, by its name. `balanced`: the rarer, the more (rows / (classes * rows of the
    class))."""
    instruction: str = "Which label fits this text: {labels}?\n\n{text}"
    """What a policy is asked when labels are judged by their likelihood."""

    @field_validator("train")
    @classmethod
    def _no_pairs(cls, train: dict[str, Any]) -> dict[str, Any]:
        if "center_rewards_coefficient" in train:
            raise complaint("is for pairs; a classify stage has none", "center_rewards_coefficient")
        if not 0 <= (train.get("label_smoothing_factor") or 0) < 1:
            raise complaint("must be from 0 to below 1", "label_smoothing_factor")
        return train

    @field_validator("labels")
    @classmethod
    def _each_once(cls, labels: list[str] | None) -> list[str] | None:
        if twice := [label for label, count in Counter(labels or ()).items() if count > 1]:
            raise complaint(f"names {twice[0]!r} twice; each output of the head stands for one class")
        return labels

    @field_validator("class_weights")
    @classmethod
    def _balanced_or_each(cls, weights: str | dict[str, float] | None) -> str | dict[str, float] | None:
        if isinstance(weights, str) and weights != "balanced":
            raise complaint(f"is {weights!r}; write balanced, or a weight for each class, such as {{spam: 5, ham: 1}}")
        return weights

    @field_validator("data")
    @classmethod
    def _whole_texts(cls, data: DataSpec) -> DataSpec:
        if data.too_long != "drop":
            raise complaint("is for dialogues. Remove it: texts longer than max_length are left out", "too_long")
        return data

    @field_validator("instruction")
    @classmethod
    def _asks(cls, instruction: str) -> str:
        if not all(field in instruction for field in ("{text}", "{labels}")):
            raise complaint("must contain {text} and {labels}")
        return instruction

    def check_rows(self, train: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Raises UserError for fewer than two classes, labels that are unknown or never seen in training, and weights
        of classes there are none of."""
        names, seen = self.classes(train)
        if len(seen) < 2:
            raise UserError(f"{self.data.path}: every row has the label {next(iter(seen), None)!r}; two are needed")
        if missing := [name for name in names if name not in seen]:
            raise UserError(f"labels: no training row has the label {missing[0]!r}. Leave it out, or add rows of it")
        several = any(len(self.labels_of(row)) > 1 for row in train)
        for row in (row for rows in (train, test or ()) for row in rows):
            if strange := [label for label in self.labels_of(row) if label not in names]:
                raise UserError(
                    f"{row['_place']}: the label {strange[0]!r} is not among those learnt ({', '.join(names)}). "
                    "Correct it, or add training rows of it; if all its rows were held out, name a file as data.test"
                )
            if not several and (count := len(self.labels_of(row))) != 1:
                raise UserError(
                    f"{row['_place']}: has {count} labels, and every training row has one label. Give it one label"
                )
        if isinstance(self.class_weights, dict) and (wrong := self.class_weights.keys() ^ set(names)):
            raise UserError(
                f"class_weights: give exactly these labels a weight: {', '.join(names)} (wrong: {min(wrong)})"
            )

    def labels_of(self, row: Row) -> list[str]:
        """The names of a row's classes. Raises UserError for a number at which no class stands."""
        given = row["label"] if isinstance(row["label"], list) else [row["label"]]
        names = []
        for label in given:
            # A CSV file holds numbers as text.
            if not self.labels or label in self.labels or not str(label).isdecimal():
                names.append(str(label))
            elif int(label) < len(self.labels):
                names.append(self.labels[int(label)])
            else:
                raise UserError(f"{row['_place']}: there is no label number {label} of `labels` (from 0)")
        return list(dict.fromkeys(names))

    def classes(self, train: Sequence[Row]) -> tuple[list[str], Counter[str]]:
        """Their names in the order of the head's outputs, and how many training rows each has."""
        seen = Counter(label for row in train for label in self.labels_of(row))
        if all(name.isdecimal() for name in seen):
            return self.labels or sorted(seen, key=int), seen
        return self.labels or sorted(seen), seen


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.Encoded.without_loss(tokenize_text(tokenizer, row["text"])[0])]


def leave_out_long(encoded: Iterator[tuple[Row, Item]], tally: Tally, max_length: int | None) -> Iterator[Item]:
    """Texts that fit max_length. Counts: rows_too_long. Raises UserError if there is none."""
    tally.counts["rows_too_long"] = 0
    for row, item in encoded:
        if max_length is None or len(item[0]) <= max_length:
            yield item
        else:
            tally.leave_out(row, "rows_too_long", f"is {len(item[0])} tokens long, max_length is {max_length}")
    if left_out := tally.counts["rows_too_long"]:
        if left_out == tally.counts["rows"]:
            raise UserError(f"stage '{tally.stage}': no text fits max_length {max_length}. Raise it")
        print(
            f"  {left_out} of {tally.counts['rows']} texts are longer than max_length {max_length}: left out",
            flush=True,
        )


def weigh_classes(weights: str | dict[str, float] | None, names: list[str], counts: Counter[str]) -> list[float]:
    """What each class counts in the loss, in the order of `names`."""
    if isinstance(weights, str):
        return [sum(counts.values()) / (len(names) * counts[name]) for name in names]
    return [float(weights[name]) if weights else 1.0 for name in names]


def mean_loss(
    outputs: Any, labels_BK: Tensor, num_items_in_batch: Any, weights_K: Tensor, smoothing: float, several: bool
) -> Tensor:
    """Cross-entropy of the class, or where texts have several the binary one of each class: the mean over the texts of
    an optimizer step, which hold num_items_in_batch labels."""
    from torch.nn import functional

    scores_BK, weights_K = outputs.logits.float(), weights_K.to(labels_BK.device)
    if several:
        smooth_BK = labels_BK * (1 - smoothing) + smoothing / 2
        losses_BK = functional.binary_cross_entropy_with_logits(scores_BK, smooth_BK, reduction="none")
        losses_B = (losses_BK * weights_K).mean(1)
    else:
        losses_B = functional.cross_entropy(
            scores_BK, labels_BK, weights_K, label_smoothing=smoothing, reduction="none"
        )
    texts = len(labels_BK) if num_items_in_batch is None else num_items_in_batch / labels_BK.shape[1]
    return losses_B.sum() / texts


def run(spec: ClassifySpec, ctx: Context) -> Result:
    import numpy
    import torch
    from accelerate.utils.memory import clear_device_cache
    from transformers import Trainer, set_seed
    from trl import RewardConfig
    from trl.trainer.utils import disable_dropout_in_model

    from pipeline.measure import classes, scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.training import invariants, sequences
    from pipeline.training import trainer as shared

    def labelled(row: Row) -> Item:
        own = spec.labels_of(row)
        return encode(tokenizer, row)[0].ids, [int(name in own) for name in names]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids_BT, mask_BT = render.padded([row["input_ids"] for row in rows], tokenizer.pad_token_id)
        labels_BK = torch.tensor([row["labels"] for row in rows], dtype=torch.float32)
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BK}

    result = Result()
    args = shared.arguments(RewardConfig, spec, ctx)
    tokenizer = bases.load_tokenizer(ctx.model)
    names, counts = spec.classes(ctx.data.train)
    several = any(len(spec.labels_of(row)) > 1 for row in ctx.data.train)
    form = sequences.Form[Item](
        ("input_ids", "labels"),
        lambda item: {"input_ids": item[0], "labels": item[1]},
        lambda row: (row["input_ids"], row["labels"]),
    )
    fit = partial(leave_out_long, max_length=args.max_length)
    train_set, test_set = sequences.store_both(ctx, spec, labelled, form, fit)
    result.counts, result.refused = train_set.tally.counts, [*train_set.tally.refused, *test_set.tally.refused]
    result.labels, result.several_labels = names, several
    true_NK = numpy.array([labels for _, labels in test_set]).reshape(-1, len(names))
    left_out = {entry["place"] for entry in result.refused}
    texts = [row["text"] for row in ctx.data.test or [] if row["_place"] not in left_out]

    # before there is a head: the likelihood of the labels' own words
    by_words: dict[int, list[int]] = {}
    if texts and not several:
        ctx.tell_measuring("before")
        policy = shared.policy(ctx, bases.load_base(ctx.model, tokenizer))
        by_words = classes.read_label_words(policy, tokenizer, spec.instruction, texts, names)
        del policy
        clear_device_cache(garbage_collection=True)  # else two bases are held at once

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
    base = bases.load_base(ctx.model, tokenizer, num_labels=len(names))
    result.base_digest = bases.frozen_digest(base)

    # adapter
    model = shared.headed(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    head_at_start = invariants.head(model)
    if args.disable_dropout:
        disable_dropout_in_model(model)

    # trainer; transformers' own lacks what the trainers of TRL count for themselves
    trainer = shared.build(
        type("ClassifyTrainer", (Trainer,), {"_metrics": {}, "_total_train_tokens": 0}),
        model,
        args=args,
        train_dataset=train_set.dataset,
        processing_class=tokenizer,
        data_collator=collate,
        compute_loss_func=partial(
            mean_loss,
            weights_K=torch.tensor(weigh_classes(spec.class_weights, names, counts)),
            smoothing=args.label_smoothing_factor,
            several=several,
        ),
    )
    trainer.model_accepts_loss_kwargs = False
    result.invariants |= invariants.only_adapter_trains(model, head=True)

    # train, with the held-out numbers of the labels' words before and of the head after
    result.counts |= shared.train(trainer, ctx, spec)
    result.invariants |= invariants.processes_agree(adapters.trainable(model))
    if texts:
        ctx.tell_measuring("after")
        scores_NK = numpy.array(scoring.scores(model, tokenizer, [ids for ids, _ in test_set]))
        seen = [row for row in ctx.data.train if row["_place"] not in left_out]
        seen_NK = numpy.array([[int(name in spec.labels_of(row)) for name in names] for row in seen])
        by_bag_NK = classes.read_bag_of_words([row["text"] for row in seen], seen_NK, texts, several)
        told_NK = classes.choose(scores_NK, several)
        result.before, result.after = classes.compare(true_NK, told_NK, by_words, by_bag_NK)
        result.tables = classes.tell(true_NK, scores_NK, names, several, result.after)

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    result.invariants |= invariants.head_was_trained(model, head_at_start)
    shared.save(model, tokenizer, ctx)
    some = [(ids,) for ids, _ in (test_set or train_set)[:4]]
    result.invariants |= invariants.reloads_alike(model, tokenizer, ctx.out.adapter, some)
    return result


STAGE = Stage(
    section=ClassifySpec,
    contract=LABELLED_TEXT,
    score_head=True,
    headlines=(MACRO_F1, ACCURACY, Metric("over_bag_of_words", "macro F1 over a bag of words")),
    numbers=(
        *("macro_f1", "macro_f1_low", "macro_f1_high", "macro_f1_gain", "macro_f1_gain_low", "macro_f1_gain_high"),
        *("accuracy", "accuracy_low", "accuracy_high"),
        *("bag_of_words", "over_bag_of_words", "over_bag_of_words_low", "over_bag_of_words_high"),
    ),
    encode=encode,
    run=run,
    learns="learns from texts with labels to name the label of a new one",
    colour="#7d8a2e",
)
