"""What was written, loaded and asked as a stranger would: this file imports nothing of OneBase.

    python readback.py JOB.json OUT

JOB names the written folder, where the base's bytes lie, and the prompts. OUT gets `said.json` (token ids of the
prompts, greedy answers, stop tokens, tensors that were missing) and `numbers.safetensors` (logits or scores).
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    torch.manual_seed(0)
    folder = job["folder"]
    gguf = {"gguf_file": job["gguf"]} if job["form"] == "gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    model, missing = load(job)
    model.eval()
    tied = one_table(model)
    labels = [model.config.id2label.get(index) for index in range(len(job["labels"]))]
    if job["form"] != "adapter":
        in_float32(model)
    ids = [render(tokenizer, row) for row in job["rows"]]
    generation = read_stops(job)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if not job["num_labels"] and job["form"] != "merged":  # a merged model has read its own
        model.generation_config = generation
    numbers, answers = {}, []
    with torch.no_grad():
        for index, row in enumerate(job["ids"]):
            row_BT = torch.tensor([row], device=model.device)
            with as_trained(job, model):
                numbers[f"{index}"] = result(job, model, row_BT)
                if not job["num_labels"]:
                    answers.append(answer(model, row_BT, stops, job["new_tokens"]))
            if job["form"] == "adapter":
                numbers[f"{index}.plain"] = result(job, model, row_BT)
    said = {"ids": ids, "answers": answers, "missing": missing, "stops": stops, "tied": tied, "labels": labels}
    write_answers(out, said, numbers)


def write_answers(out: Path, said: dict[str, Any], numbers: dict[str, torch.Tensor]) -> None:
    """Where the gate reads what this process found."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(numbers, out / "numbers.safetensors")
    (out / "said.json").write_text(json.dumps(said), encoding="utf-8")


def load(job: dict[str, Any]) -> tuple[Any, list[str]]:
    """The model as the written files describe it, and the names of weights they should hold but do not."""
    kind: Any = AutoModelForSequenceClassification if job["num_labels"] else AutoModelForCausalLM
    options: dict[str, Any] = {
        "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"},
        "output_loading_info": True,
        "attn_implementation": job["attention"],
        "dtype": "auto",
    }
    if job["form"] == "gguf":
        from transformers import GgufConfig

        plain = GgufConfig(dequantize=True)
        options |= {"gguf_file": job["gguf"], "dtype": torch.float16, "quantization_config": plain}
    if job["form"] != "adapter":
        model, info = kind.from_pretrained(job["folder"], **options)
        return model, sorted(info["missing_keys"])
    from peft import PeftModel, get_peft_model_state_dict

    record = json.loads((Path(job["folder"]) / "onebase.json").read_text(encoding="utf-8"))["load"]
    options |= {"dtype": getattr(torch, record["dtype"]), "attn_implementation": record["attn_implementation"]}
    if record["quantization"]:
        options["quantization_config"] = BitsAndBytesConfig(**record["quantization"])  # type: ignore[no-untyped-call]
    if job["labels"]:
        options["id2label"] = dict(enumerate(record["labels"]))
        options["label2id"] = {label: index for index, label in enumerate(record["labels"])}
    elif job["num_labels"]:
        options["num_labels"] = job["num_labels"]
    if job["num_labels"]:
        options["pad_token_id"] = record["pad_token_id"]
    written = set(load_file(Path(job["folder"]) / "adapter_model.safetensors"))
    if job["num_labels"] and not any(".score." in name for name in written):
        sys.exit("the score head is missing from adapter_model.safetensors")
    base, _ = kind.from_pretrained(job["base"], revision=job["revision"], **options)
    if job["num_labels"]:
        base.score.float()  # before PEFT takes it as the shape of the head that it loads
    for module in base.modules():  # bitsandbytes' repacked kernel for AVX512-BF16 is not the arithmetic of training
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = PeftModel.from_pretrained(base, job["folder"])
    return model, sorted(set(get_peft_model_state_dict(model)) ^ written)


def one_table(model: Any) -> bool:
    """Whether the LM head is the table of the token embeddings, with no adapter on either."""
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(part is None or hasattr(part, "base_layer") or hasattr(part, "modules_to_save") for part in parts):
        return False
    return torch.equal(parts[0].weight, parts[1].weight)


def as_trained(job: dict[str, Any], model: Any) -> Any:
    """An adapter is compared in the arithmetic it was trained in, files that hold whole models in float32."""
    dtype = getattr(torch, job["dtype"])
    on = job["form"] == "adapter" and dtype is not torch.float32
    return torch.autocast(model.device.type, dtype=dtype, enabled=on)


def in_float32(model: Any) -> None:
    """Compute in float32 from the weights as they are held: two roundings of bfloat16 differ by more than a merge.

    A layer's float32 copy lives for its product only, so no more memory is needed than for one layer.
    """

    def forward(x: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
        weight = layer.weight
        if hasattr(weight, "quant_state"):
            from peft.utils.integrations import dequantize_module_weight

            weight = dequantize_module_weight(layer)
        bias = None if layer.bias is None else layer.bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), bias)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = functools.partial(forward, layer=module)  # type: ignore[method-assign]
        else:
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.float()


def result(job: dict[str, Any], model: Any, row_BT: torch.Tensor) -> torch.Tensor:
    """The same as `last_logits`, the scores of an adapter's head in the arithmetic of training."""
    if job["num_labels"] and job["form"] == "adapter":
        classifier = model.get_base_model()
        states_TH = classifier.base_model(input_ids=row_BT).last_hidden_state[0]
        with torch.autocast(model.device.type, enabled=False):  # the head computes in float32, as in training
            scores: torch.Tensor = classifier.score(states_TH[-1].float()).cpu()
        return scores
    return last_logits(job, model, row_BT)


def last_logits(job: dict[str, Any], model: Any, row_BT: torch.Tensor) -> torch.Tensor:
    """What the model itself gives for a sequence, in float32: its last logits (K, V), or its scores (num_labels,)."""
    arguments = {} if job["num_labels"] else {"logits_to_keep": job["keep"], "use_cache": False}
    logits: torch.Tensor = model(input_ids=row_BT, **arguments).logits[0].float().cpu().contiguous()
    return logits


def render(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """The prompt's token ids through the written template; a classifier's text by the tokenizer alone."""
    if "text" in row:
        return list(tokenizer(row["text"])["input_ids"])
    if isinstance(row["prompt"], str):
        return list(tokenizer(row["prompt"] + row.get("answer", ""))["input_ids"])
    answer = [{"role": "assistant", "content": row["answer"]}] if "answer" in row else []
    try:
        text = tokenizer.apply_chat_template(row["prompt"] + answer, tokenize=False, add_generation_prompt=not answer)
    except Exception:  # no template, or one that fails: said as ids that equal nothing
        return []
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read_stops(job: dict[str, Any]) -> GenerationConfig:
    """How the written files say that an answer ends."""
    if job["form"] != "gguf":
        return GenerationConfig.from_pretrained(job["folder"])
    from gguf import GGUFReader

    fields = GGUFReader(Path(job["folder"]) / job["gguf"]).fields
    names = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ends = [int(fields[name].contents()) for name in names if name in fields]
    return GenerationConfig(eos_token_id=ends, pad_token_id=ends[0])  # type: ignore[no-untyped-call]


def answer(model: Any, row_BT: torch.Tensor, stops: list[int], new_tokens: int) -> dict[str, Any]:
    """What the files answer to whoever asks no more of them than a length."""
    written_BT = model.generate(input_ids=row_BT, attention_mask=torch.ones_like(row_BT), max_new_tokens=new_tokens)
    new = written_BT[0, row_BT.shape[1] :].tolist()
    return {"ids": new, "ended": bool(new) and new[-1] in stops}


if __name__ == "__main__":
    main()
