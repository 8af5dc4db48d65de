"""Held-out prompts answered by sampling, and what every judge says of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.tokens import stop_ids
from pipeline.disk.atomic import Json
from pipeline.measure import matching
from pipeline.models import sampling
from pipeline.ppo import rewards

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench


def take(bench: Bench, policy: str, rows: list[Row], settings: Json) -> Json:
    """The tables that measures.Answers names. Raises UserError if a declared truth is not 0 or 1."""
    sources, truth = settings["sources"], settings["truth"]
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
            batch_size=max(1, 4 * bench.at_once // copies),
            copies=copies,
        )
    texts = [
        str(bench.tokenizer.decode(e.answer_ids[:-1] if e.ended else e.answer_ids, skip_special_tokens=True)).strip()
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
        found["truth"] = _rows([float(matching.correct(r, t)) for r, t in zip(asked, texts, strict=True)], copies)
    elif truth:
        found["truth"] = found["scores"].get(truth) or _rows(_scores(bench, truth, asked, texts, True), copies)
    if settings.get("reference"):
        theirs = bench.log_probs(settings["reference"], episodes, bench.at_once)
        found["kl"] = _rows([sum(e.logp) - b for e, b in zip(episodes, theirs, strict=True)], copies)
    return found


def _scores(bench: Bench, source: str, asked: list[Row], texts: list[str], truth: bool) -> list[float]:
    named = [rewards.source(source, 1.0, truth)]
    return rewards.scores(named, bench.actors, bench.tokenizer, asked, texts, bench.at_once)[source]


def _rows(flat: list[Any], width: int) -> list[list[Any]]:
    return [flat[start : start + width] for start in range(0, len(flat), width)]
