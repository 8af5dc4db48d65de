"""What is measured, item by item: plain lists that go to disk, from which results.py makes numbers with intervals."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from pipeline.data import render
from pipeline.data.baselines import said, word_margins
from pipeline.data.contracts import Row
from pipeline.data.tokens import stop_ids
from pipeline.disk.atomic import Json
from pipeline.measure import answers, matching, scoring
from pipeline.measure.scoring import batches
from pipeline.models import sampling
from pipeline.models.base import computing
from pipeline.ppo import rewards

if TYPE_CHECKING:
    from pipeline.data.render import Encoded
    from pipeline.evaluate.bench import Bench

AT_ONCE = 64
"""Sequences that pass through the model together."""
PROMPT_TOKENS_AT_ONCE = 512


def loss(bench: Bench, policy: str, rows: list[Row], kind: str) -> Json:
    """`nats` and `tokens` of each held-out row: the surprise at its supervised tokens, and how many there are."""
    encode = {"corpus": lambda row: render.document(bench.tokenizer, row["text"])}.get(
        kind, lambda row: render.demonstration(bench.tokenizer, row)
    )
    encoded: list[Encoded] = [encode(row) for row in rows]
    with bench.acting_as(policy):
        nats = [-total for total in scoring.log_likelihoods(bench.model, bench.tokenizer, encoded)]
    return {"nats": nats, "tokens": [sum(label != render.IGNORED for label in row.labels[1:]) for row in encoded]}


def preferences(bench: Bench, policy: str, rows: list[Row]) -> Json:
    """`margins`: nats a token by which the chosen answer is likelier than the rejected one."""
    replies = [reply for row in rows for reply in render.pair(bench.tokenizer, row)]
    with bench.acting_as(policy):
        totals = scoring.log_likelihoods(bench.model, bench.tokenizer, [reply.sequence() for reply in replies])
    means = [total / reply.supervised for total, reply in zip(totals, replies, strict=True)]
    return {"margins": [better - worse for better, worse in zip(means[0::2], means[1::2], strict=True)]}


def questions(bench: Bench, policy: str, rows: list[Row], examples: list[Row]) -> Json:
    """Greedy answers: `text`, `right` (the reference is named and no other choice is), `exact`, `f1`, `stopped`.

    `examples`: dialogues put before each question (few-shot).
    """
    shots = [message for example in examples for message in example["messages"]]
    asked = [{**row, "prompt": shots + row["prompt"]} if shots else row for row in rows]
    with bench.acting_as(policy):
        told = answers.generate(bench.model, bench.tokenizer, asked, alike=bool(shots))
    texts = [answer.text for answer in told]
    pairs = list(zip(rows, texts, strict=True))
    return {
        "text": texts,
        "right": [answers.correct(row, text) for row, text in pairs],
        "exact": [matching.exact_match(text, row["answer"]) for row, text in pairs],
        "f1": [matching.token_f1(text, row["answer"]) for row, text in pairs],
        "stopped": [answer.stopped for answer in told],
    }


def choices(bench: Bench, policy: str, rows: list[Row]) -> Json:
    """`picked`: the likeliest of each question's choices, by the summed log-likelihood of its tokens; `wanted`: the
    right one."""
    sequences = [[_choice(bench, row, choice) for choice in row["choices"]] for row in rows]
    # What all choices of a question begin with says nothing about them, and is read once.
    shared = [len(os.path.commonprefix(options)) for options in sequences]
    picked: list[str] = [""] * len(rows)
    with bench.acting_as(policy):
        for batch in batches(shared, PROMPT_TOKENS_AT_ONCE):
            totals = _continuations(
                bench,
                [sequences[i][0][: shared[i]] for i in batch],
                [[option[shared[i] :] for option in sequences[i]] for i in batch],
            )
            for index, row_totals in zip(batch, totals, strict=True):
                best = max(range(len(row_totals)), key=row_totals.__getitem__)
                picked[index] = rows[index]["choices"][best]
    wanted = [row["answer"] for row in rows]
    right = [choice == answer for choice, answer in zip(picked, wanted, strict=True)]
    return {"picked": picked, "wanted": wanted, "right": right}


def _choice(bench: Bench, row: Row, choice: str) -> list[int]:
    """A question's ids with one of its choices as the answer, without the token that ends the turn."""
    text = isinstance(row["prompt"], str)
    told: Any = f" {choice}" if text else [{"role": "assistant", "content": choice}]
    reply = render.reply(bench.tokenizer, {"prompt": row["prompt"], "choice": told}, "choice")
    return reply.prompt_ids + reply.reply_ids[:-1]


def _continuations(bench: Bench, prompts: list[list[int]], options: list[list[list[int]]]) -> list[list[float]]:
    """log p of every option after its prompt. Each prompt passes through the model once."""
    actors = bench.actors
    ids_BT, mask_BT = (t.to(actors.device) for t in render.padded(prompts, actors.pad_id, side="left"))
    cache = DynamicCache(config=actors.config)
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    owner = [index for index, of_one in enumerate(options) for _ in of_one]
    flat = [option or [actors.pad_id] for of_one in options for option in of_one]
    with computing(bench.model):
        first_BV = torch.log_softmax(
            actors.logits(actors.hidden(ids_BT, mask_BT, positions_BT, cache)[:, -1]).float(), -1
        )
        owner_N = torch.tensor(owner, device=actors.device)
        ids_NG, mask_NG = (t.to(actors.device) for t in render.padded(flat, actors.pad_id))
        logp_NG = first_BV[owner_N, ids_NG[:, 0]][:, None]
        if ids_NG.shape[1] > 1:
            cache.batch_select_indices(owner_N)
            places_NG = positions_BT[owner_N, -1:] + 1 + torch.arange(ids_NG.shape[1] - 1, device=actors.device)
            whole_NT = torch.cat([mask_BT[owner_N], mask_NG[:, :-1]], 1)
            hidden_NGH = actors.hidden(ids_NG[:, :-1], whole_NT, places_NG, cache)
            logits_MV = actors.logits(hidden_NGH.flatten(0, 1)).float()
            later_M = torch.log_softmax(logits_MV, -1).gather(1, ids_NG[:, 1:].reshape(-1, 1))
            later_NG = later_M.view(len(owner), -1)
            logp_NG = torch.cat([logp_NG, later_NG], 1)
    logp_NG = logp_NG * mask_NG
    totals = iter(logp_NG.sum(1).tolist())
    return [[next(totals) if option else (next(totals), 0.0)[1] for option in of_one] for of_one in options]


def sampled(
    bench: Bench, policy: str, rows: list[Row], sources: list[str], truth: str | None, settings: dict[str, Any]
) -> Json:
    """Answers sampled at the training temperature, `copies` to a prompt, with the same random draws for every policy.

    Tables of (prompts, copies): text, length (tokens), ended, truth (1 right, 0 wrong), scores by source, and kl, which
    is log p of the policy, as the sampler noted it, less that of `settings["reference"]`, where one is named.
    """
    copies = settings["copies"]
    prompts = [render.prompt(bench.tokenizer, row) for row in rows]
    with bench.sampling_as(policy):
        episodes = sampling.sample(
            bench.actors,
            prompts,
            new_tokens=settings["new_tokens"],
            temperature=bench.actors.temperature,
            stops=stop_ids(bench.tokenizer),
            generator=torch.Generator(bench.actors.device).manual_seed(settings["seed"]),
            at_once=max(1, 4 * AT_ONCE // copies),
            copies=copies,
        )
    texts = [
        bench.tokenizer.decode(e.answer_ids[:-1] if e.ended else e.answer_ids, skip_special_tokens=True).strip()
        for e in episodes
    ]
    asked = [row for row in rows for _ in range(copies)]
    found: Json = {
        "text": _rows(texts, copies),
        "length": _rows([len(e.answer_ids) for e in episodes], copies),
        "ended": _rows([e.ended for e in episodes], copies),
        "truth": None,
        "scores": {name: _rows(_scores(bench, name, asked, texts, name == truth), copies) for name in sources},
        "kl": None,
    }
    if truth == "answer":
        found["truth"] = _rows([float(answers.correct(r, t)) for r, t in zip(asked, texts, strict=True)], copies)
    elif truth:
        found["truth"] = found["scores"].get(truth) or _rows(_scores(bench, truth, asked, texts, True), copies)
    if settings.get("reference"):
        theirs = bench.log_probs(settings["reference"], episodes, AT_ONCE)
        found["kl"] = _rows([sum(e.logp) - b for e, b in zip(episodes, theirs, strict=True)], copies)
    return found


def _scores(bench: Bench, source: str, asked: list[Row], texts: list[str], truth: bool) -> list[float]:
    named = [rewards.source(source, 1.0, truth)]
    return rewards.scores(named, bench.actors, bench.tokenizer, asked, texts, AT_ONCE)[source]


def _rows(flat: list[Any], width: int) -> list[list[Any]]:
    return [flat[start : start + width] for start in range(0, len(flat), width)]


def pairs(bench: Bench, reward: str, rows: list[Row], train: list[Row]) -> Json:
    """Scores of both answers of held-out comparisons, their lengths in tokens, and what a bag of words says of them."""
    whole = {key: [render.conversation(bench.tokenizer, row, key) for row in rows] for key in ("chosen", "rejected")}
    name = rewards.adapter_name(reward)
    known, asked = ([(said(row["chosen"]), said(row["rejected"])) for row in some] for some in (train, rows))
    return {
        **{key: bench.actors.scores(name, ids, AT_ONCE) for key, ids in whole.items()},
        **{f"{key}_length": [len(ids) for ids in sequences] for key, sequences in whole.items()},
        "guideline": [row.get("guideline") for row in rows],
        "bag_of_words": word_margins(known, asked) or [0.0] * len(rows),
    }
