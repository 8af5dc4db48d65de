"""README.md: what this model is, what it grew from, what was measured, and how to load it."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Gone
from pipeline.publish import adapter, measured
from pipeline.publish.sealed import Sealed
from pipeline.recipe import yaml

RELATION = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARY = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}
CHECKED = {
    "logits_relative_error": "relative error of the logits",
    "scores_relative_error": "error of the scores, relative to their spread",
    "without_autocast": "the same without autocast, where plain PEFT rounds elsewhere",
    "kl": "KL(trained, written), nats a token",
    "base_distance": "the base without the adapter, by the same measure",
    "greedy_answers_equal": "greedy answers equal",
    "prompts": "prompts asked",
}


def render(sealed: Sealed, form: str, name: str, files: list[str], parity: dict[str, Json], load: Json | None) -> str:
    """The card's text. `name`: what others load it by (a Hub id or a folder); parity: the gate's numbers by file."""
    from huggingface_hub import ModelCardData

    license_ = _license(sealed)
    data = ModelCardData(
        base_model=sealed.base_id,
        base_model_relation=RELATION[form] if sealed.base_id else None,
        library_name=LIBRARY[form],
        license=license_,
        pipeline_tag="text-classification" if sealed.num_labels else "text-generation",
        datasets=_hub_datasets(sealed) or None,
        tags=["onebase", *(["reward-model"] if sealed.what == "a reward model" else []), "lora", sealed.kind],
    )
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {sealed.title}",
        _about(sealed, form),
        "## How to load it\n\n" + _loading(sealed, form, name, files, load),
        "## What it may be used for\n\n" + _use(sealed),
        "## Where it comes from\n\n" + _lineage(sealed),
        "## What was measured\n\n" + measured.table(sealed),
        "## Is it what was trained?\n\n" + _parity(sealed, parity),
        "## Recipe\n\n```yaml\n" + yaml.dump(sealed.recipe) + "```",
        "## Versions and cost\n\n" + _cost(sealed),
        "## Licence\n\n"
        + (
            f"The base is under `{license_}`, which governs what is derived from it."
            if license_
            else "The base's licence governs what is derived from it; it could not be read when this card was written."
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _about(sealed: Sealed, form: str) -> str:
    base, model = sealed.base_id or "a base that is not on the Hub", sealed.model
    bits = "" if model.quantize == "none" else f", frozen and quantised to {model.quantize.upper()}"
    holds = {
        "adapter": "This repository holds the LoRA adapter; the base is loaded from where it is published.",
        "merged": "This repository holds whole weights: the adapter added onto the dequantised base.",
        "gguf": "This repository holds whole weights as GGUF, for llama.cpp and Ollama.",
    }[form]
    stage = f"the stage `{sealed.artifact.name}` ({sealed.kind}) of a chain trained on {base}{bits}"
    return f"{sealed.what.capitalize()}: {stage}. {holds}"


def _loading(sealed: Sealed, form: str, name: str, files: list[str], load: Json | None) -> str:
    how = {"adapter": _load_adapter, "merged": _load_merged, "gguf": _load_gguf}[form]
    return how(sealed, name, files, load or {}) + _left_out(sealed, form)


def _left_out(sealed: Sealed, form: str) -> str:
    """The decoding words that the base's authors ship, for whoever wants them."""
    words = {} if sealed.num_labels else adapter.decoding_words(sealed)
    if not words:
        return ""
    told = [f"{word}: {json.dumps(value)}".replace("`", "'") for word, value in words.items()]
    listed = ", ".join(f"`{one if len(one) <= 80 else one[:79] + '…'}`" for one in told)
    vllm = (
        " vLLM takes them from the base unless its `--generation-config` says otherwise." if form == "adapter" else ""
    )
    return (
        f"\n\nThe base's own generation config also says {listed}. All stages were trained and measured without these, "
        f"and so is what stands above; pass them along with a question to have them.{vllm}"
    )


def _load_adapter(sealed: Sealed, name: str, files: list[str], load: Json) -> str:
    kind = "AutoModelForSequenceClassification" if sealed.num_labels else "AutoModelForCausalLM"
    given = [f'dtype="{load["dtype"]}"']
    if load["attn_implementation"] != "sdpa":  # transformers' own choice
        given.append(f'attn_implementation="{load["attn_implementation"]}"')
    if load["revision"]:
        given.append(f'revision="{load["revision"]}"')
    if load["quantization"]:
        words = ", ".join(f"{key}={value!r}" for key, value in load["quantization"].items())
        given.append(f"quantization_config=BitsAndBytesConfig({words})")
    if sealed.labels:
        given += ["id2label=dict(enumerate(labels))", "label2id={label: i for i, label in enumerate(labels)}"]
    elif sealed.num_labels:
        given.append("num_labels=1")
    if sealed.num_labels:
        given.append(f"pad_token_id={load['pad_token_id']}")
    four_bit = ", BitsAndBytesConfig" if load["quantization"] else ""
    python = "\n".join(
        [
            "from peft import PeftModel",
            f"from transformers import {kind}, AutoTokenizer{four_bit}",
            "",
            *([f"labels = {sealed.labels}"] if sealed.labels else []),
            f'base = {kind}.from_pretrained("{load["base"]}", {", ".join(given)})',
            *(["base.score.float()  # so that the adapter's score head is not rounded"] if sealed.num_labels else []),
            f'model = PeftModel.from_pretrained(base, "{name}")  # transformers and PEFT',
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        ]
    )
    text = f"```python\n{python}\n```"
    if load["quantization"]:
        text += (
            "\n\nOn a CPU with AVX512-BF16, bitsandbytes computes 4-bit layers in other arithmetic than training did, "
            "which moves logits and scores a little."
        )
    if sealed.num_labels:
        warning = (
            "transformers says of the base that its `score.weight` is newly initialized; the adapter brings the head."
        )
        if load["dtype"] != "float32":
            warning += (
                " In training the head computed in float32, as it does here. Without the line that says so, "
                f"`model(**tokens).logits` gives the same rounded to {load['dtype']}, which has two or three digits."
            )
        return f"{text}\n\n{warning}\n\n{_score(sealed, load['dtype'])}"
    return (
        f"{text}\n\n{_ask(sealed, name, load['dtype'])}\n\n"
        f"vLLM: `vllm serve {load['base']} --enable-lora --lora-modules {sealed.artifact.name}={name} "
        f"--max-lora-rank {_rank(sealed)}` (on the base in {load['dtype']}; the "
        "figures below are for the quantised one; publish `--as merged` for the same answers there). "
        "Ollama: publish `--as gguf`."
    )


def _ask(sealed: Sealed, name: str, autocast: str = "float32") -> str:
    """How a policy is asked something; `name`: where its stop tokens are, if the model does not have them already."""
    template = (sealed.artifact.adapter / "chat_template.jinja").is_file()
    talk = 'apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True, return_dict=True, '
    read = f'tokenizer.{talk}return_tensors="pt")' if template else 'tokenizer("Once upon", return_tensors="pt")'
    ends = f'model.generation_config = GenerationConfig.from_pretrained("{name}")  # where an answer stops'
    answer = "answer = model.generate(**tokens, max_new_tokens=100)"
    lines = [
        *(["import torch"] if autocast != "float32" else []),
        *(["from transformers import GenerationConfig"] if name else []),
        *([""] if name else []),
        f"tokens = {read}.to(model.device)",
        *([ends] if name else []),
        *([f"with torch.autocast(model.device.type, dtype=torch.{autocast}):"] if autocast != "float32" else []),
        ("    " if autocast != "float32" else "") + answer,
        'print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _score(sealed: Sealed, autocast: str = "float32") -> str:
    """How a conversation is scored, or a text classified, in the arithmetic of training."""
    if sealed.labels:
        read = 'tokens = tokenizer("Some text.", return_tensors="pt").to(model.device)'
        lines = ["import torch", "", read]
    else:
        talk = 'talk = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        read = 'tokens = tokenizer.apply_chat_template(talk, return_dict=True, return_tensors="pt").to(model.device)'
        lines = ["import torch", "", talk, read]
    if autocast == "float32":
        lines += ["with torch.no_grad():", "    scores = model(**tokens).logits[0]"]
    else:
        lines += [
            f"with torch.no_grad(), torch.autocast(model.device.type, dtype=torch.{autocast}):",
            "    states = base.base_model(**tokens).last_hidden_state",
            "scores = base.score(states[0, -1].float())",
        ]
    if not sealed.labels:
        return "```python\n" + "\n".join([*lines, "score = scores.item()"]) + "\n```"
    lines.append("print(dict(zip(labels, scores.softmax(-1).tolist())))")
    rounds = "" if autocast == "float32" else f", which computes the head in {autocast} as well"
    return (
        "```python\n"
        + "\n".join(lines)
        + f"\n```\n\nOr by transformers' pipeline{rounds}:\n\n"
        + _classify("model=model, tokenizer=tokenizer", autocast)
    )


def _classify(model: str, autocast: str = "float32") -> str:
    """How transformers' pipeline classifies a text; `model`: its arguments that name the model."""
    lines = [
        *(["import torch"] if autocast != "float32" else []),
        "from transformers import pipeline",
        "",
        f'classify = pipeline("text-classification", {model})',
        *([f"with torch.autocast(model.device.type, dtype=torch.{autocast}):"] if autocast != "float32" else []),
        ("    " if autocast != "float32" else "") + 'print(classify("Some text.", top_k=None))  # every label',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _load_merged(sealed: Sealed, name: str, files: list[str], load: Json) -> str:
    if sealed.labels:
        return _classify(f'model="{name}"')
    kind = "AutoModelForSequenceClassification" if sealed.num_labels else "AutoModelForCausalLM"
    python = (
        f"from transformers import {kind}, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = {kind}.from_pretrained("{name}", dtype="auto")  # transformers'
    )
    return f"```python\n{python}\n```\n\n" + (
        _score(sealed) if sealed.num_labels else f"{_ask(sealed, '')}\n\nvLLM: `vllm serve {name}`."
    )


def _load_gguf(sealed: Sealed, name: str, files: list[str], load: Json) -> str:
    gguf = [file for file in files if file.endswith(".gguf")]
    ollama = (
        f"Ollama, in this folder: `ollama create {sealed.title} -f Modelfile && ollama run {sealed.title}` (the "
        "Modelfile is made from the training template and its stop tokens)."
        if "Modelfile" in files
        else "Ollama: no Modelfile is given, because the training template is more than a sequence of turns; the GGUF "
        "files hold it for engines that read Jinja."
    )
    python = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}", gguf_file="{gguf[0]}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="{gguf[0]}")  # transformers'
    )
    return f"{ollama}\n\nllama.cpp: `llama-server --jinja -m {gguf[0]}`.\n\n```python\n{python}\n```"


def _use(sealed: Sealed) -> str:
    if sealed.labels:
        names = ", ".join(f"`{label}`" for label in sealed.labels)
        return (
            f"To sort texts like those it was trained on into {len(sealed.labels)} labels: {names}. Of any other text "
            "it gives one of these labels as well, and its scores there mean little."
        )
    if sealed.num_labels:
        return (
            "To score answers in the manner of the comparisons it was trained on, as a reward in further training or "
            "to rank answers. A score means nothing beside one of another model, and little far from those comparisons."
        )
    return (
        "To answer in the manner of the data listed below. It was measured on held-out rows of that data only; what "
        "it says of anything else has not been tested, and it was not trained to refuse harmful requests unless that "
        "data taught it to."
    )


def _lineage(sealed: Sealed) -> str:
    lines = ["| stage | kind | grew from | data | rows used | sha256 of the data | adapter |", "| --- " * 7 + "|"]
    for entry in sealed.lineage:
        if isinstance(entry, Gone):
            lines.append(f"| {entry.stage} | | | trained again since | | | `{entry.adapter[:16]}` |")
            continue
        parents = ", ".join(f"{parent.stage} ({_cell(role)})" for role, parent in entry.parents.items())
        names = ", ".join(_cell(source.path) for source in entry.data.sources)
        used = ", ".join(f"{source.used} of {source.rows}" for source in entry.data.sources)
        hashes = ", ".join(f"`{sha[:16]}`" for sha in entry.data_hashes.values() if sha)
        adapter = f"`{entry.files[WEIGHTS][:16]}`"
        grew = parents or f"{sealed.base_id or 'the base'} (`{entry.base_hash}`)"
        lines.append(f"| {entry.stage} | {entry.kind} | {grew} | {names} | {used} | {hashes} | {adapter} |")
    return "\n".join(lines) + "\n\nWhole hashes, counts and settings are in `onebase.json`." + _base_note(sealed)


def _cell(text: str) -> str:
    """A text as it stands, in a cell of a table. Part of a lineage may be somebody else's words."""
    return html.escape(re.sub(r"([\\`\[|])", r"\\\1", text), quote=False)


def _base_note(sealed: Sealed) -> str:
    if sealed.base_id is None or sealed.base_verified:
        return ""
    return (
        f"\n\nThe chain was trained on a local copy of {sealed.base_id} (`{sealed.manifest.base_hash}`), which "
        "could not be compared with the Hub's files. If yours differ, so will the answers."
    )


def _parity(sealed: Sealed, parity: dict[str, Json]) -> str:
    same = "tokens, the same labels" if sealed.labels else "tokens from the template, the same stop tokens"
    lines = [
        "Before it was published, the files here were loaded in a new process and compared with the trained base and "
        f"adapter: the same {same}, and",
        "",
    ]
    for file, found in parity.items():
        told = ", ".join(f"{words} {_figure(found[key])}" for key, words in CHECKED.items() if key in found)
        lines.append(f"- {file}: {told}")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    return str(value) if isinstance(value, int) or value == 0 else f"{value:.2g}"


def _cost(sealed: Sealed) -> str:
    lines = ["| stage | seconds | peak memory | on |", "| --- " * 4 + "|"]
    for entry in sealed.known:
        peak = f"{entry.peak_memory_mib} MiB ({entry.peak_memory_is})"
        lines.append(f"| {entry.stage} | {entry.seconds} | {_cell(peak)} | {_cell(entry.device)} |")
    versions = _cell(", ".join(f"{name} {version}" for name, version in sealed.known[-1].versions.items()))
    return "\n".join(lines) + f"\n\nTrained with {versions}."


def _rank(sealed: Sealed) -> int:
    wanted = int(sealed.model.lora.get("r", 8))
    return next((rank for rank in (8, 16, 32, 64, 128, 256) if rank >= wanted), wanted)


def _hub_datasets(sealed: Sealed) -> list[str]:
    found = []
    for entry in sealed.known:
        data = entry.section["data"]
        named = {f"mix[{number}]": part["path"] for number, part in enumerate(data.get("mix") or [])}
        named |= {word: data.get(word) for word in ("path", "test")}
        on_hub = [named.get(role) for role, sha in entry.data_hashes.items() if str(sha).startswith("hub:")]
        found += [name for name in on_hub if isinstance(name, str)]
    return list(dict.fromkeys(found))


def _license(sealed: Sealed) -> str | None:
    """The base's licence: from its own card beside the weights, else from the Hub."""
    from huggingface_hub import HfApi, ModelCard

    own = Path(sealed.model.base) / "README.md"
    try:
        if own.is_file():
            found = ModelCard.load(own).data.license
        else:
            info = HfApi().model_info(sealed.base_id, timeout=10) if sealed.base_id else None
            found = info.card_data.license if info and info.card_data else None
    except Exception:  # no Hub, or a card that is no YAML: the licence is not known
        return None
    return str(found) if found else None
