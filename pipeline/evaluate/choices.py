"""Which of a question's choices a policy finds likeliest; what the choices share is read once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.measure.scoring import batches
from pipeline.models.base import computing

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

PROMPT_TOKENS_AT_ONCE = 512


def pick(bench: Bench, policy: str, rows: list[Row]) -> list[str]:
    """The likeliest of each question's choices, by the summed log-likelihood of its tokens."""
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
    return picked


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
