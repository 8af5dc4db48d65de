"""Held-out prompts answered by sampling, and what every judge says of the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipeline.data.contracts import Row
from pipeline.data.tokens import stop_ids
from pipeline.disk.atomic import Json
from pipeline.measure import matching
from pipeline.models import dialogue
from pipeline.models.dialogue import Told
from pipeline.ppo import rewards

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench


def take(bench: Bench, policy: str, rows: list[Row], settings: Json) -> Json:
    """The tables that measures.Answers names. Raises UserError if a declared truth is not 0 or 1."""
    sources, truth = settings["sources"], settings["truth"]
    copies = settings["copies"]
    with bench.sampling_as(policy):
        told = dialogue.answer(
            bench.actors,
            bench.tokenizer,
            rows,
            new_tokens=settings["new_tokens"],
            temperature=bench.actors.temperature,
            stops=stop_ids(bench.tokenizer),
            generator=torch.Generator(bench.actors.device).manual_seed(settings["seed"]),
            batch_size=max(1, 4 * bench.at_once // copies),
            copies=copies,
            iterations=settings.get("max_tool_calling_iterations"),
        )
    episodes, texts = [one.episode for one in told], [one.text for one in told]
    found: Json = {
        "text": _rows(texts, copies),
        "length": _rows([len(e.sampled) for e in episodes], copies),
        "ended": _rows([e.ended for e in episodes], copies),
        "truth": None,
        "scores": {name: _rows(_scores(bench, name, told, name == truth), copies) for name in sources},
        "kl": None,
    }
    if truth == "answer":
        found["truth"] = _rows([float(matching.correct(one.row, one.text)) for one in told], copies)
    elif truth:
        found["truth"] = found["scores"].get(truth) or _rows(_scores(bench, truth, told, True), copies)
    if settings.get("reference"):
        theirs = bench.log_probs(settings["reference"], episodes, bench.at_once)
        found["kl"] = _rows([sum(e.logp) - b for e, b in zip(episodes, theirs, strict=True)], copies)
    return found


def _scores(bench: Bench, source: str, told: list[Told], truth: bool) -> list[float]:
    named = [rewards.source(source, 1.0, truth)]
    return rewards.scores(named, bench.actors, bench.tokenizer, told, bench.at_once)[source]


def _rows(flat: list[Any], width: int) -> list[list[Any]]:
    return [flat[start : start + width] for start in range(0, len(flat), width)]
