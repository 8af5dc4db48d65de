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

from pipeline.disk.atomic import Json, write_json
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


class Broken(UserError):
    """What was written does not answer as what was trained."""


def check(sealed: Sealed, form: str, folder: Path, ggufs: Sequence[str] = ()) -> dict[str, Json]:
    """Compare what lies in `folder` with what was trained, and return the numbers by the form's or the file's name.

    form: adapter, merged or gguf; ggufs: the files of that form below `folder`.  Raises Broken naming every
    difference, its numbers and the likely cause.
    """
    parity: dict[str, Json] = {}
    with tempfile.TemporaryDirectory() as scratch:
        asked = _job(sealed, form, folder)
        trained = _asked("trained", asked, Path(scratch) / "trained")
        for name in ggufs or [form]:
            type_ = name.removesuffix(".gguf").rpartition("-")[2].lower()
            job = {**asked, "ids": trained["ids"], "gguf": name, "type": type_}
            try:
                written = _asked("readback", job, Path(scratch) / "written")
            except UserError as error:
                raise Broken(f"what was written cannot be loaded back: {error}") from None
            found, wrong = compare(job, trained, written)
            if found.pop("numbers_differ"):
                wrong += _likely(job, trained, written, Path(scratch))
            if wrong:
                what = f"{name}, as it was written," if form == "gguf" else "what was written"
                raise Broken(f"{what} does not answer as what was trained:\n  " + "\n  ".join(wrong))
            parity[name] = {"prompts": len(job["rows"]), **found}
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
            f"the chat template or the tokenizer is another: {len(unlike)} of {len(job['rows'])} prompts become other "
            f"tokens than in training; the first parts at token {at} ({ours[at : at + 3]} became {theirs[at : at + 3]})"
        )
    if written["labels"] != job["labels"]:
        wrong.append(f"the labels are named {written['labels']}, in training {job['labels']}")
    if not job["num_labels"] and set(trained["stops"]) != set(written["stops"]):
        wrong.append(
            f"answers stop at other tokens: {sorted(written['stops'])}, in training {sorted(trained['stops'])}"
        )
    numbers, off = _distance(job, trained["numbers"], written["numbers"])
    if job["form"] != "adapter" and numbers:
        apart, near_base = _apart(job, trained["numbers"], written["numbers"])
        numbers, off = {**numbers, **apart}, [*off, *near_base]
    wrong += off
    if not job["num_labels"]:
        parted, late = _answers(job, trained, written)
        wrong += late
        numbers["greedy_answers_equal"] = len(job["rows"]) - parted
    return {**numbers, "numbers_differ": bool(off)}, wrong


def _distance(job: Json, trained: Json, written: Json) -> tuple[Json, list[str]]:
    import numpy

    what = "scores" if job["num_labels"] else "logits"
    rows = range(len(job["rows"]))
    pairs = [(trained[f"{i}"].astype(numpy.float64), written[f"{i}"].astype(numpy.float64)) for i in rows]
    if any(a.shape != b.shape for a, b in pairs):
        return {}, [f"{what} have another shape: {pairs[0][1].shape[-1:]}, in training {pairs[0][0].shape[-1:]}"]
    if job["form"] == "gguf":
        kl = float(numpy.mean([_kl(a, b) for a, b in pairs]))
        limit = KL_LIMIT[job["type"]]
        off = [] if kl < limit else [f"KL(trained || written) is {kl:.2g} nats a token, allowed is {limit:g}"]
        return {"kl": kl, "kl_limit": limit}, off
    measure = _score_error if job["num_labels"] else _logit_error
    error, limit = measure(pairs), LOGIT_LIMIT[job["form"]]
    numbers = {f"{what}_relative_error": error, "limit": limit}
    off = [] if error <= limit else [f"{what} differ by {error:.2%} (relative), allowed is {limit:.0%}"]
    if job["form"] == "adapter":
        plain = [(a, written[f"{i}.plain"].astype(numpy.float64)) for i, (a, _) in enumerate(pairs)]
        numbers["without_autocast"] = measure(plain)
    return numbers, off


def _apart(job: Json, trained: Json, written: Json) -> tuple[Json, list[str]]:
    """How far the bare base is from what was trained, and in words if that is too little for this error."""
    error = _error(job, trained, written)
    base = _of_base(trained)
    distance, to_base = _error(job, trained, base), _error(job, base, written)
    share = NEAR
    if job["form"] == "gguf":
        share = NEAR**2 if job["type"] == "f16" else math.inf
    if error <= share * distance and error < to_base:
        return {"base_distance": distance}, []
    unit = "{:.2g} nats a token" if job["form"] == "gguf" else "{:.2%}"
    far, ours, theirs = (unit.format(value) for value in (distance, error, to_base))
    if to_base <= error:
        why = f"it is nearer to the bare base ({theirs}) than to what was trained ({ours})"
    else:
        why = (
            f"the adapter moves the base by {far} only, which an error of {ours} is too large to tell from nothing "
            f"(allowed is {unit.format(share * distance)}). Publish --as adapter, which is exact"
        )
    return {"base_distance": distance}, [why]


def _of_base(trained: Json) -> Json:
    return {key.removesuffix(".base"): rows for key, rows in trained.items() if key.endswith(".base")}


def _error(job: Json, wanted: Json, found: Json) -> float:
    return float(next(iter(_distance(job, wanted, found)[0].values()), math.inf))


def _logit_error(pairs: list[tuple[Any, Any]]) -> float:
    """The largest of the prompts' relative errors. A constant added to a row of logits changes nothing, so each row is
    taken less its mean."""
    import numpy

    centred = [(a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)) for a, b in pairs]
    return max(float(numpy.linalg.norm(b - a) / numpy.linalg.norm(a)) for a, b in centred)


def _score_error(pairs: list[tuple[Any, Any]]) -> float:
    """The largest difference of a score, relative to how far the trained scores spread."""
    import numpy

    trained = numpy.stack([a for a, _ in pairs])
    written = numpy.stack([b for _, b in pairs])
    return float(numpy.abs(trained - written).max() / max(numpy.ptp(trained), 1e-6))


def _kl(trained_KV: Any, written_KV: Any) -> float:
    import numpy

    def log_softmax(rows_KV: Any) -> Any:
        shifted_KV = rows_KV - rows_KV.max(-1, keepdims=True)
        return shifted_KV - numpy.log(numpy.exp(shifted_KV).sum(-1, keepdims=True))

    p_KV, q_KV = log_softmax(trained_KV), log_softmax(written_KV)
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


def _likely(job: Json, trained: Json, written: Json, scratch: Path) -> list[str]:
    """What the written files answer like instead."""
    whole = {**job, "form": "merged"}
    to_base = _error(whole, _of_base(trained["numbers"]), written["numbers"])
    if to_base <= min(LOGIT_LIMIT["merged"], _error(whole, trained["numbers"], written["numbers"])):
        return ["likely: the adapter was dropped; these are the base's own answers"]
    if job["form"] != "adapter" and job["model"]["quantize"] != "none":
        other = {**job, "model": {**job["model"], "quantize": "none"}, "base_digest": None}
        unquantised = _asked("trained", other, scratch / "unquantised")
        error = _error(whole, unquantised["numbers"], written["numbers"])
        if error <= LOGIT_LIMIT["merged"]:
            return [
                "likely: the adapter was added onto the base's original weights, not onto the dequantised "
                f"{job['model']['quantize']} weights it was trained on"
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
        "attention": sealed.model.attn_implementation,
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
    asked: list[Any] = list(TURNS) if template else list(TEXTS)
    if sealed.artifact.samples.is_file():
        lines = sealed.artifact.samples.read_text(encoding="utf-8").splitlines()[:OWN_PROMPTS]
        asked += [json.loads(line)["prompt"] for line in lines]
    if not sealed.num_labels:
        return [{"prompt": prompt} for prompt in asked]
    return [{"prompt": prompt, "answer": answer} for prompt in asked for answer in ANSWERS]


def _asked(who: str, job: Json, out: Path) -> Json:
    """What one process answers: said.json with its numbers under `numbers`."""
    from safetensors.numpy import load_file

    file = out.with_suffix(".json")
    write_json(file, job)
    # The reader of what was written must not find our package, so it is run as a file, in isolation (-I).
    readback = [sys.executable, "-I", str(Path(__file__).with_name("readback.py"))]
    command = readback if who == "readback" else [sys.executable, "-m", "pipeline.publish.trained"]
    offline = {"HF_HUB_OFFLINE": "1"} if Path(job["base"]).exists() else {}
    environment = {**EVERYWHERE, **os.environ, **QUIET, **offline}
    if who == "trained":
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    done = subprocess.run([*command, str(file), str(out)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(
            f"the process that asks the {who} model ended with status {done.returncode}:\n  "
            + "\n  ".join(done.stderr.strip().splitlines()[-6:])
        )
    said = json.loads((out / "said.json").read_text(encoding="utf-8"))
    return {**said, "numbers": load_file(out / "numbers.safetensors")}
