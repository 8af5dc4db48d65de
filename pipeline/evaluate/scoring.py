"""Held-out numbers from likelihoods and scores: exact means over rows or tokens, whatever the batches were."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from pipeline.data.render import IGNORED, Encoded, Reply, padded
from pipeline.evaluate import reward_check
from pipeline.models.base import computing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_BATCH = 1536


def language_model(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Encoded]) -> dict[str, float]:
    """`loss`: mean negative log-likelihood of a supervised token, in nats; `perplexity`: its exponential."""
    if not rows:
        return {}
    total = sum(log_likelihoods(model, tokenizer, rows))
    # The first token of a sequence has nothing before it to be predicted from.
    tokens = sum(sum(label != IGNORED for label in row.labels[1:]) for row in rows)
    loss = -total / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def preferences(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[Reply, Reply]]
) -> dict[str, float]:
    """`preference_accuracy`: share of pairs whose chosen answer is likelier than the rejected one (ranking accuracy,
    arXiv 2405.19534), by the mean log-likelihood of a token, so that the shorter answer has no advantage (as in
    arXiv 2405.14734); `preference_margin`: mean difference of these, in nats a token."""
    if not pairs:
        return {}
    answers = [answer for pair in pairs for answer in pair]
    totals = log_likelihoods(model, tokenizer, [answer.sequence() for answer in answers])
    means = [total / len(answer.reply_ids) for total, answer in zip(totals, answers, strict=True)]
    return _ranking(means[0::2], means[1::2], "preference_accuracy", "preference_margin")


def reward_model(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[int], list[int]]]
) -> dict[str, float]:
    """`accuracy`: share of pairs whose chosen answer scores higher; `margin`: mean difference of the scores;
    `over_longer`: by how much the rule "the longer answer wins" is beaten, with its 95 % interval."""
    if not pairs:
        return {}
    values = scores(model, tokenizer, [ids for pair in pairs for ids in pair])
    found = _ranking(values[0::2], values[1::2], "accuracy", "margin")
    margins = [better - worse for better, worse in zip(values[0::2], values[1::2], strict=True)]
    rule = reward_check.over_longer(margins, *([len(pair[side]) for pair in pairs] for side in (0, 1)))
    return found | {"over_longer": rule.value, "over_longer_low": rule.low, "over_longer_high": rule.high}


def _ranking(chosen: list[float], rejected: list[float], accuracy: str, margin: str) -> dict[str, float]:
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    return {accuracy: sum(m > 0 for m in margins) / len(margins), margin: sum(margins) / len(margins)}


@torch.no_grad()
def log_likelihoods(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Encoded]) -> list[float]:
    """For each sequence, the sum of log p(token | before) over its supervised tokens, in nats."""
    model.eval()
    sums = [0.0] * len(rows)
    for batch in batches([len(row.ids) for row in rows]):
        ids_BT, mask_BT = padded([rows[i].ids for i in batch], tokenizer.pad_token_id)
        labels_BT, _ = padded([rows[i].labels for i in batch], IGNORED)
        targets_BT = labels_BT[:, 1:]
        # Logits only where some row of the batch has a target: the vocabulary is most of the work here.
        wanted_K = (targets_BT != IGNORED).any(0).nonzero().squeeze(1)
        if len(wanted_K) == 0:
            continue
        with computing(model):
            logits_BKV = model(
                input_ids=ids_BT.to(model.device),
                attention_mask=mask_BT.to(model.device),
                logits_to_keep=wanted_K.to(model.device),
                use_cache=False,
            ).logits
        targets_BK = targets_BT[:, wanted_K].to(logits_BKV.device)
        losses_BK = torch.nn.functional.cross_entropy(
            logits_BKV.float().transpose(1, 2), targets_BK, ignore_index=IGNORED, reduction="none"
        )
        for index, total in zip(batch, (-losses_BK.sum(1)).tolist(), strict=True):
            sums[index] = total
    return sums


@torch.no_grad()
def scores(model: PeftModel, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> list[float]:
    """The reward model's score of each sequence, read at its last token."""
    model.eval()
    values = [0.0] * len(sequences)
    for batch in batches([len(ids) for ids in sequences]):
        ids_BT, mask_BT = padded([sequences[i] for i in batch], tokenizer.pad_token_id)
        with computing(model):
            scores_B1 = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)).logits
        for index, value in zip(batch, scores_B1.float().squeeze(1).tolist(), strict=True):
            values[index] = value
    return values


def batches(lengths: list[int], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices in batches of like length, each of at most `tokens` once padded (or of one row)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
