"""The trained base and adapter, asked the probe's prompts: what published files are measured against.

python -m pipeline.publish.trained JOB.json OUT
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from pipeline.data import render
from pipeline.data.tokens import stop_ids
from pipeline.errors import UserError
from pipeline.models import adapters, base, sampling
from pipeline.models.forward import LanguageModel, plain_layers
from pipeline.models.spec import ModelSpec
from pipeline.publish.readback import in_float32, last_logits, one_table, write_answers


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    spec = ModelSpec(**job["model"])
    tokenizer = base.load_tokenizer(spec)
    torch.manual_seed(0)
    frozen = base.load_base(spec, tokenizer, num_labels=job["num_labels"])
    digest = base.frozen_digest(frozen)
    if job["base_digest"] not in (None, digest):
        sys.exit(
            f"the base in memory ({digest}) is not the one this stage was trained on ({job['base_digest']}): other "
            "files, another version of bitsandbytes, or a device that quantises differently"
        )
    model = adapters.as_trained(frozen, Path(job["adapter"])).eval()
    tied = one_table(model.get_base_model())
    if job["float32"]:
        in_float32(model)
    ids = [encode(tokenizer, row) for row in job["rows"]]
    numbers: dict[str, torch.Tensor] = {}
    answers: list[dict[str, Any]] = []
    with torch.no_grad():
        for index, row in enumerate(ids):
            numbers[f"{index}"] = result(model, row, job)
            with without_adapter(model):
                numbers[f"{index}.base"] = result(model, row, job)
            if not job["num_labels"]:
                answers.append(answer(model, tokenizer, row, job))
    said = {"ids": ids, "answers": answers, "stops": stop_ids(tokenizer), "tied": tied}
    write_answers(out, said, numbers)


def encode(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """A prompt as training rendered it; for a reward model with its answer.
    A classifier reads a text as the tokenizer alone encodes it."""
    if "text" in row:
        return list(tokenizer(row["text"])["input_ids"])
    if "answer" not in row:
        return render.prompt(tokenizer, row)
    if isinstance(row["prompt"], str):
        return list(tokenizer(row["prompt"] + row["answer"])["input_ids"])
    return render.conversation(
        tokenizer, {**row, "answer": [{"role": "assistant", "content": row["answer"]}]}, "answer"
    )


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Inside, the base alone; of a model with a score head the base under the trained head."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    yield
    for layer in layers:
        layer.enable_adapters(True)


def result(model: Any, row: list[int], job: dict[str, Any]) -> torch.Tensor:
    with base.computing(model):
        return last_logits(job, model, torch.tensor([row], device=model.device))


def answer(model: Any, tokenizer: Any, row: list[int], job: dict[str, Any]) -> dict[str, Any]:
    fast = model.device.type == "cpu" and not job["float32"]
    with plain_layers(model, fold_adapter=False) if fast else contextlib.nullcontext():
        episode = sampling.sample(
            LanguageModel(model, tokenizer.pad_token_id),
            [row],
            new_tokens=job["new_tokens"],
            temperature=0,
            stops=stop_ids(tokenizer),
            generator=torch.Generator(model.device),
        )[0]
    return {"ids": episode.answer_ids, "ended": episode.ended}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
