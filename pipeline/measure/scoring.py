"""Held-out numbers from likelihoods and scores: exact means over rows or tokens, whatever the batches were."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from pipeline.data.render import IGNORED, Encoded, Reply, padded
from pipeline.measure import heads, intervals
from pipeline.measure.metric import perplexity
from pipeline.measure.ranking import over_longer, rank_auc, ranked_right
from pipeline.models import processes
from pipeline.models.base import computing
from pipeline.models.forward import LanguageModel
from pipeline.models.out_of_memory import run_in_parts
from pipeline.plan.sizes import EVALUATION_LOGITS, EVALUATION_TOKENS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def language_model(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded]) -> dict[str, float]:
    """`loss`: mean negative log-likelihood of a supervised token, in nats, with its 95 % interval over rows where there
    are several (`loss_low`, `loss_high`); `perplexity`: its exponential."""
    if not rows:
        return {}
    nats = [-total for total in log_likelihoods(model, tokenizer, rows)]
    # The first token of a sequence has nothing before it to be predicted from.
    found = intervals.ratio(nats, [sum(label != IGNORED for label in row.labels[1:]) for row in rows])
    return found.numbers("loss") | {"perplexity": perplexity(found.value)}


def preferences(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Reply, Reply]]
) -> dict[str, float]:
    """`preference_accuracy`: share of pairs whose chosen answer is likelier than the rejected one (ranking accuracy,
    arXiv 2405.19534), a tie counting half, by the mean log-likelihood of a token, so that the shorter answer has no
    advantage (as in arXiv 2405.14734); `preference_margin`: mean difference of these, in nats a token."""
    if not pairs:
        return {}
    return ranking(*token_means(model, tokenizer, pairs), "preference_accuracy", "preference_margin")


def token_means(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[Reply, Reply]]
) -> tuple[list[float], list[float]]:
    """The mean log-likelihood of a token, in nats, of every chosen answer and of every rejected one."""
    answers = [answer for pair in pairs for answer in pair]
    totals = log_likelihoods(model, tokenizer, [answer.sequence() for answer in answers], together=2)
    means = [total / answer.supervised for total, answer in zip(totals, answers, strict=True)]
    return means[0::2], means[1::2]


def reward_model(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    swapped: Sequence[list[int]] = (),
) -> dict[str, float]:
    """`accuracy`: share of pairs whose chosen answer scores higher, a tie counting half; `margin`: mean difference of
    the scores;
    `over_longer`: by how much the rule "the longer answer wins" is beaten, with its 95 % interval.
    Of a model with several heads, whose score is their mean, also what heads.disagreement gives. `swapped`: sequences
    out of distribution."""
    if not pairs:
        return {}
    heads_NK = head_scores(model, tokenizer, [ids for pair in pairs for ids in pair], together=2)
    values: list[float] = heads_NK.mean(1).tolist()
    found = ranking(values[0::2], values[1::2], "accuracy", "margin")
    margins = [better - worse for better, worse in zip(values[0::2], values[1::2], strict=True)]
    rule = over_longer(margins, *([len(pair[side]) for pair in pairs] for side in (0, 1)))
    found |= rule.numbers("over_longer")
    if heads_NK.shape[1] > 1:
        swapped_SK = head_scores(model, tokenizer, swapped)
        for name, estimate in heads.disagreement(heads_NK[0::2], heads_NK[1::2], swapped_SK).items():
            found |= estimate.numbers(name)
    return found


def ratings(now: Sequence[float], at_start: Sequence[float], good: Sequence[bool], beta: float) -> dict[str, float]:
    """Of answers with thumbs up (`good`) or down, by their log-likelihoods now and under the reference. The implied
    reward of an answer is beta times what it has gained (arXiv 2402.01306, eq. 1); at the start all are 0, ties, and
    count half.

    `reward_auc`: how often an answer with thumbs up has the greater one, of all pairs of one with thumbs up and one
    with thumbs down; `reward_margin`: mean of those with thumbs up less mean of the others; `sign_accuracy`: share of
    answers whose reward has the sign of their label. The first two need answers of both labels.
    """
    if not good:
        return {}
    rewards_P, good_P = beta * (numpy.array(now) - numpy.array(at_start)), numpy.array(good)
    found = {"sign_accuracy": float(ranked_right(numpy.where(good_P, rewards_P, -rewards_P)).mean())}
    if not good_P.any() or good_P.all():
        return found
    up, down = rewards_P[good_P], rewards_P[~good_P]
    return found | {"reward_auc": rank_auc(up, down), "reward_margin": float(up.mean() - down.mean())}


def ranking(chosen: list[float], rejected: list[float], accuracy: str, margin: str) -> dict[str, float]:
    """The share of pairs ranked right, a tie counting half, and the mean margin, under the two names given."""
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    return {accuracy: float(ranked_right(margins).mean()), margin: sum(margins) / len(margins)}


@torch.no_grad()
def log_likelihoods(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], together: int = 1
) -> list[float]:
    """For each sequence, the sum of log p(token | before) over its supervised tokens, in nats. `together`: so many rows
    after each other begin alike."""
    model.eval()
    language_model = LanguageModel(model, tokenizer.pad_token_id)

    def of(batch: Sequence[int]) -> list[float]:
        ids_BT, mask_BT = padded([rows[i].ids for i in batch], tokenizer.pad_token_id)
        labels_BT, _ = padded([rows[i].labels for i in batch], IGNORED)
        # Logits only where there is a target: the vocabulary is most of the work here.
        row_N, state_N = (labels_BT[:, 1:] != IGNORED).nonzero(as_tuple=True)
        if len(row_N) == 0:
            return [0.0] * len(batch)
        with computing(model):
            hidden_BTH = language_model.hidden(ids_BT.to(model.device), mask_BT.to(model.device))
        states_NH = hidden_BTH[row_N.to(model.device), state_N.to(model.device)]
        logp_N = token_log_likelihoods(language_model, states_NH, labels_BT[row_N, state_N + 1].to(model.device)).cpu()
        return [logp_N[row_N == place].sum().item() for place in range(len(batch))]

    return _by_batches(of, [len(row.ids) for row in rows], together)


def token_log_likelihoods(language_model: LanguageModel, states_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """log p of each token given the hidden state before it, (N,) in float32; EVALUATION_LOGITS at a time."""
    size = max(1, EVALUATION_LOGITS // language_model.config.vocab_size)
    parts = []
    for states_nH, ids_n in zip(torch.split(states_NH, size), torch.split(ids_N, size), strict=True):
        with computing(language_model.model):
            logits_nV = language_model.logits(states_nH)
        parts.append(-torch.nn.functional.cross_entropy(logits_nV.float(), ids_n, reduction="none"))
    return torch.cat(parts)


def head_scores(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[list[int]], together: int = 1
) -> numpy.ndarray[Any, Any]:
    """The same as `scores`, (N, K) of a model with K heads."""
    heads_NK = numpy.array(scores(model, tokenizer, sequences, together), dtype=float)
    return heads_NK.reshape(len(sequences), -1) if len(sequences) else numpy.empty((0, 1))


@torch.no_grad()
def scores(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, sequences: Sequence[list[int]], together: int = 1
) -> list[Any]:
    """The score of each sequence, read at its last token, its head in float32; a list of them where the model has
    several outputs. `together`: so many sequences after each other begin alike."""
    model.eval()

    def of(batch: Sequence[int]) -> list[float]:
        ids_BT, mask_BT = padded([sequences[i] for i in batch], tokenizer.pad_token_id)
        with computing(model):
            scores_B1 = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)).logits
        return scores_B1.squeeze(1).tolist()  # type: ignore[no-any-return]

    return _by_batches(of, [len(ids) for ids in sequences], together)


def _by_batches(of: Callable[[Sequence[int]], list[Any]], lengths: list[int], together: int) -> list[Any]:
    """One value for each row, computed batch by batch; several processes share the batches."""
    values: dict[int, Any] = {}
    for batch in processes.share(list(batches(lengths, together=together))):
        parts = run_in_parts(of, batch, lengths.__getitem__)
        values |= zip(batch, itertools.chain.from_iterable(parts), strict=True)
    found = {index: value for part in processes.gather(values) for index, value in part.items()}
    return [found[index] for index in range(len(lengths))]


def batches(lengths: list[int], tokens: int = EVALUATION_TOKENS, together: int = 1) -> Iterator[list[int]]:
    """Indices in batches of like length, each of at most `tokens` once padded (or of one group). `together` rows after
    each other are a group and stay in one batch, where what they begin with is computed once."""
    groups = [range(first, first + together) for first in range(0, len(lengths), together)]
    longest = [max(lengths[index] for index in group) for group in groups]
    batch: list[int] = []
    for length, group in sorted(zip(longest, groups, strict=True), key=lambda pair: pair[0]):
        if batch and (len(batch) + together) * length > tokens:
            yield batch
            batch = []
        batch += group
    if batch:
        yield batch
