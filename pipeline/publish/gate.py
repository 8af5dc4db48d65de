"""Parity: what was written answers as what was trained, or it is not published.

Two new processes answer the same prompts, one with the trained base and adapter (trained.py), one with the written
files and no code of ours (readback.py). Compared are the token ids of the rendered prompts, the tokens an answer stops
at, the logits or scores, greedy answers, and the names of a classifier's labels.

    adapter   logits equal, in the arithmetic of training (autocast)
    merged    logits within 2 %, relative: |written - trained| / |trained|, each row of logits less its mean
    gguf      KL(trained || written) under 1e-4 nats a token for f16; for coarser types see KL_LIMIT

Whole weights also have to be nearer to what was trained than to the bare base: of an adapter that changes little, the
base itself is within those limits. The error may be a quarter of the distance from the base to what was trained (of
KL, which grows with the square, a sixteenth); of the coarser files it has to be less than the distance from the base.

They are compared in float32, from the 4-bit weights as training dequantises them: the rounding of bfloat16
arithmetic alone is 2 % of the logits of a model of 135M parameters, more than the merge itself.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import load_file
from scipy.special import log_softmax

from pipeline.disk.atomic import Json, read_lines, write_json
from pipeline.errors import UserError
from pipeline.publish.sealed import Sealed
from pipeline.runs.environment import EVERYWHERE, QUIET

LOGIT_LIMIT = {"adapter": 0.0, "merged": 0.02}
KL_LIMIT = {"f16": 1e-4, "q8_0": 1e-2, "q4_k_m": 0.5}
"""Nats a token. f16 is the promise; the others only tell a coarser grid from a broken file."""
NEAR = 0.25
"""The largest error of whole weights, as a share of the distance from the base to what was trained."""
NEW_TOKENS = 16
KEPT_LOGITS = 16
OWN_PROMPTS = 3

TURNS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello! Who are you?"}],
    [{"role": "user", "content": "Name three things one finds on a beach, one per line."}],
    [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "12 + 30 = 42."},
        {"role": "user", "content": "And twice that?"},
    ],
    [{"role": "user", "content": "Übersetze: “good morning” — 早上好 🙂\n\tand   keep the spaces."}],
]
TEXTS = ["The lighthouse keeper opened the door and", "In 1969, two people", "Übermorgen – 早上好 🙂:"]
ANSWERS = ["Good question.", "I do not know, and I do not care.", "84."]


Numbers = dict[str, Any]
"""By prompt, or prompt and variant: an array of logits (K, V), or of scores (num_labels,)."""


class Broken(UserError):
    """What was written does not answer as what was trained."""


def check(sealed: Sealed, form: str, folder: Path, ggufs: Sequence[str] = ()) -> dict[str, Json]:
    """Compare what lies in `folder` with what was trained, and return the numbers by the form's or the file's name.

    form: adapter, merged or gguf; ggufs: the files of that form below `folder`.  Raises Broken naming every
    difference, its numbers and the likely cause.
    """
    parity: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as scratch:
        job = _job(sealed, form, folder)
        trained = _run("trained", job, Path(scratch) / "trained")
        for name in ggufs or [form]:
            job |= {"ids": trained["ids"], "gguf": name, "type": name.removesuffix(".gguf").rpartition("-")[2].lower()}
            try:
                written = _run("readback", job, Path(scratch) / "written")
            except UserError as error:
                raise Broken(f"what was written cannot be loaded back: {error}") from None
            numbers, wrong = compare(job, trained, written)
            if numbers.pop("numbers_differ"):
                wrong += _likely(job, trained["numbers"], written["numbers"], Path(scratch))
            if wrong:
                what = f"{name}, as it was written," if form == "gguf" else "what was written"
                raise Broken(f"{what} does not answer as what was trained:\n  " + "\n  ".join(wrong))
            parity[name] = {"prompts": len(job["rows"]), **numbers}
    return parity


def compare(job: Json, trained: Json, written: Json) -> tuple[Json, list[str]]:
    """The numbers, and in words whatever is not as it must be."""
    wrong = []
    if written["missing"]:
        missing, head = written["missing"], [n for n in written["missing"] if "lm_head" in n or "score" in n]
        name = "the score head" if any("score" in n for n in head) else "the LM head" if head else "a weight"
        if trained["tied"] and any("embed_tokens" in n for n in missing):
            name = "the table of the token embeddings, which is the tied LM head as well,"
        wrong.append(f"{name} is missing: {len(missing)} tensors are not in the files, first {(head or missing)[0]}")
    if job["form"] != "adapter" and trained["tied"] and not written["tied"]:
        wrong.append("the tied LM head was lost: the written head is not the table of the token embeddings")
    unlike = [i for i, (a, b) in enumerate(zip(trained["ids"], written["ids"], strict=True)) if a != b]
    if unlike:
        ours, theirs = trained["ids"][unlike[0]], written["ids"][unlike[0]]
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
        wrong.append(
            f"the chat template or the tokenizer is a different one: {len(unlike)} of {len(job['rows'])} prompts "
            f"become different tokens than in training; the first differs at token {at} ({ours[at : at + 3]} became "
            f"{theirs[at : at + 3]})"
        )
    if written["labels"] != job["labels"]:
        wrong.append(f"the labels are named {written['labels']}, in training {job['labels']}")
    if not job["num_labels"] and set(trained["stops"]) != set(written["stops"]):
        wrong.append(
            f"answers stop at different tokens: {sorted(written['stops'])}, in training {sorted(trained['stops'])}"
        )
    numbers, off = _distance(job, trained["numbers"], written["numbers"])
    wrong += off
    if not job["num_labels"]:
        parted, late = _answers(job, trained, written)
        wrong += late
        numbers["greedy_answers_equal"] = len(job["rows"]) - parted
    return {**numbers, "numbers_differ": bool(off)}, wrong


def _distance(job: Json, trained: Numbers, written: Numbers) -> tuple[Json, list[str]]:
    """How far what was written is from what was trained, and in words whatever of it is too far."""
    what = "scores" if job["num_labels"] else "logits"
    ours, theirs = trained["0"].shape[-1:], written["0"].shape[-1:]
    error = _error(job, trained, written)
    if math.isinf(error):
        return {}, [f"{what} have another shape: {theirs}, in training {ours}"]
    if job["form"] == "gguf":
        numbers = {"kl": error, "kl_limit": KL_LIMIT[job["type"]]}
        too_far = f"KL(trained || written) is {error:.2g} nats a token, allowed is {numbers['kl_limit']:g}"
        off = [] if error < numbers["kl_limit"] else [too_far]
    else:
        numbers = {f"{what}_relative_error": error, "limit": LOGIT_LIMIT[job["form"]]}
        too_far = f"{what} differ by {error:.2%} (relative), allowed is {numbers['limit']:.0%}"
        off = [] if error <= numbers["limit"] else [too_far]
    if job["form"] == "adapter":
        return {**numbers, "without_autocast": _error(job, trained, _variant(written, "plain"))}, off
    base = _variant(trained, "base")
    distance, to_base = _error(job, trained, base), _error(job, base, written)
    return {**numbers, "base_distance": distance}, off + _too_near(job, error, distance, to_base)


def _too_near(job: Json, error: float, distance: float, to_base: float) -> list[str]:
    """In words, if this error cannot tell what was trained from the bare base. `distance`: of the base from what was
    trained; `to_base`: of what was written from the base."""
    share = NEAR
    if job["form"] == "gguf":
        share = NEAR**2 if job["type"] == "f16" else math.inf
    if error <= share * distance and error < to_base:
        return []
    unit = "{:.2g} nats a token" if job["form"] == "gguf" else "{:.2%}"
    far, ours, theirs, allowed = (unit.format(value) for value in (distance, error, to_base, share * distance))
    if to_base <= error:
        return [f"it is nearer to the bare base ({theirs}) than to what was trained ({ours})"]
    return [
        f"the adapter changes the base by {far} only, and what was written is off by {ours} (allowed is {allowed}): "
        "too much to tell it from the bare base. Publish --as adapter, which is exact"
    ]


def _variant(numbers: Numbers, of: str) -> Numbers:
    """The numbers of the same prompts from the bare base (`base`), or without autocast (`plain`)."""
    return {key.removesuffix(f".{of}"): rows for key, rows in numbers.items() if key.endswith(f".{of}")}


def _error(job: Json, expected: Numbers, found: Numbers) -> float:
    """The distance by the measure of the form, over all prompts: the mean KL(expected || found) in nats a token, else
    the largest relative error. Infinite where the shapes differ."""
    keys = [f"{index}" for index in range(len(job["rows"]))]
    pairs = [(expected[key].astype(numpy.float64), found[key].astype(numpy.float64)) for key in keys]
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    if job["form"] == "gguf":
        return float(numpy.mean([_kl(a, b) for a, b in pairs]))
    if job["num_labels"]:  # relative to how far the expected scores spread
        ours, theirs = (numpy.stack(side) for side in zip(*pairs, strict=True))
        return float(numpy.abs(ours - theirs).max() / max(numpy.ptp(ours, axis=0).max(), 1e-6))
    # A constant added to a row of logits changes nothing, so each row is taken less its mean.
    centred = [(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)) for a, b in pairs]
    return max(float(numpy.linalg.norm(b - a) / numpy.linalg.norm(a)) for a, b in centred)


def _kl(trained_KV: Any, written_KV: Any) -> float:
    p_KV, q_KV = log_softmax(trained_KV, axis=-1), log_softmax(written_KV, axis=-1)
    return float((numpy.exp(p_KV) * (p_KV - q_KV)).sum(-1).mean())


def _answers(job: Json, trained: Json, written: Json) -> tuple[int, list[str]]:
    """How many greedy answers part, and in words those that may not: an adapter's answers are equal; of files that
    round, most answers must be, since one token on the verge of another changes all that follows."""
    parted = [i for i, (a, b) in enumerate(zip(trained["answers"], written["answers"], strict=True)) if a != b]
    allowed = 0 if job["form"] == "adapter" else len(job["rows"]) // 2
    if job["form"] == "gguf" and job["type"] != "f16":
        allowed = len(job["rows"])
    if len(parted) <= allowed:
        return len(parted), []
    ours, theirs = trained["answers"][parted[0]], written["answers"][parted[0]]
    return len(parted), [
        f"{len(parted)} of {len(job['rows'])} greedy answers differ (allowed: {allowed}), the first: tokens "
        f"{theirs['ids'][:8]}{' and it stops' if theirs['ended'] else ''}, in training "
        f"{ours['ids'][:8]}{' and it stops' if ours['ended'] else ''}"
    ]


def _likely(job: Json, trained: Numbers, written: Numbers, scratch: Path) -> list[str]:
    """What the written files answer like instead."""
    whole = {**job, "form": "merged"}
    to_base = _error(whole, _variant(trained, "base"), written)
    if to_base <= min(LOGIT_LIMIT["merged"], _error(whole, trained, written)):
        return ["likely: the adapter was dropped; these are the base's own answers"]
    quantize = job["model"]["quantize"]
    if job["form"] != "adapter" and quantize != "none":
        other = {**job, "model": {**job["model"], "quantize": "none"}, "base_digest": None}
        unquantised = _run("trained", other, scratch / "unquantised")["numbers"]
        if _error(whole, unquantised, written) <= LOGIT_LIMIT["merged"]:
            return [
                "likely: the adapter was added onto the base's original weights, not onto the dequantised "
                f"{quantize} weights it was trained on"
            ]
    return []


def _job(sealed: Sealed, form: str, folder: Path) -> Json:
    from pipeline.models.base import local_folder

    return {
        "form": form,
        "folder": str(folder),
        "num_labels": sealed.num_labels,
        "labels": sealed.labels,
        "model": sealed.model.model_dump(),
        "adapter": str(sealed.artifact.adapter),
        "base": local_folder(sealed.model),
        "revision": sealed.model.revision,
        "dtype": sealed.model.dtype,
        "attention": sealed.model.stock_attention,
        "base_digest": sealed.manifest.base_digest,
        "float32": form != "adapter",
        "rows": _prompts(sealed),
        "keep": KEPT_LOGITS,
        "new_tokens": NEW_TOKENS,
    }


def _prompts(sealed: Sealed) -> list[Json]:
    """Fixed prompts, and the first few of the stage's own; for a classifier fixed texts."""
    if sealed.labels:
        return [{"text": text} for text in [*TEXTS, *(turns[-1]["content"] for turns in TURNS)]]
    template = (sealed.artifact.adapter / "chat_template.jinja").is_file()
    prompts: list[Any] = list(TURNS) if template else list(TEXTS)
    if sealed.artifact.samples.is_file():
        lines = read_lines(sealed.artifact.samples)[:OWN_PROMPTS]
        prompts += [json.loads(line)["prompt"] for line in lines]
    if not sealed.num_labels:
        return [{"prompt": prompt} for prompt in prompts]
    return [{"prompt": prompt, "answer": answer} for prompt in prompts for answer in ANSWERS]


def _run(who: str, job: Json, out: Path) -> Json:
    """What one process answers: answers.json with its numbers under `numbers`."""
    file = out.with_suffix(".json")
    write_json(file, job)
    environment = {**EVERYWHERE, **os.environ, **QUIET}
    if Path(job["base"]).exists():
        environment["HF_HUB_OFFLINE"] = "1"
    if who == "trained":
        command = [sys.executable, "-m", "pipeline.publish.trained"]
        paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    else:  # the reader of what was written must not find our package, so it is run as a file, in isolation (-I)
        command = [sys.executable, "-I", str(Path(__file__).with_name("readback.py"))]
    done = subprocess.run([*command, str(file), str(out)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(
            f"the process that asks the {who} model ended with status {done.returncode}:\n  "
            + "\n  ".join(done.stderr.strip().splitlines()[-6:])
        )
    answers = json.loads((out / "said.json").read_text(encoding="utf-8"))
    return {**answers, "numbers": load_file(out / "numbers.safetensors")}
