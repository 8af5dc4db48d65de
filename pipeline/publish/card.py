"""README.md: what this model is, what it grew from, what was measured, and how to load it (card.md.jinja)."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import jinja2

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
    header = ModelCardData(
        base_model=sealed.base_id,
        base_model_relation=RELATION[form] if sealed.base_id else None,
        library_name=LIBRARY[form],
        license=license_,
        pipeline_tag="text-classification" if sealed.num_labels else "text-generation",
        datasets=_hub_datasets(sealed) or None,
        tags=["onebase", *(["reward-model"] if sealed.what == "a reward model" else []), "lora", sealed.kind],
    )
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("card.md.jinja").render(
        header=header.to_yaml(),
        sealed=sealed,
        form=form,
        name=name,
        load=load,
        arguments=_arguments(sealed, load) if load else "",
        has_template=(sealed.artifact.adapter / "chat_template.jinja").is_file(),
        rank=_rank(sealed),
        files=files,
        ggufs=[file for file in files if file.endswith(".gguf")],
        decoding=_decoding(sealed),
        lineage=_lineage(sealed),
        measured=measured.table(sealed),
        parity={file: _checked(numbers) for file, numbers in parity.items()},
        recipe=yaml.dump(sealed.recipe),
        cost=_cost(sealed),
        license=license_,
    )


def _arguments(sealed: Sealed, load: Json) -> str:
    """How the base is loaded under the adapter: the arguments of from_pretrained after its name."""
    given = [f'dtype="{load["dtype"]}"']
    if load["attn_implementation"] != "sdpa":  # transformers' own choice
        given.append(f'attn_implementation="{load["attn_implementation"]}"')
    if load["revision"]:
        given.append(f'revision="{load["revision"]}"')
    if load["quantization"]:
        quantization = ", ".join(f"{key}={value!r}" for key, value in load["quantization"].items())
        given.append(f"quantization_config=BitsAndBytesConfig({quantization})")
    if sealed.labels:
        given += [
            f'problem_type="{sealed.problem_type}"',
            "id2label=dict(enumerate(labels))",
            "label2id={label: i for i, label in enumerate(labels)}",
        ]
    elif sealed.num_labels:
        given.append(f"num_labels={sealed.num_labels}")
    if sealed.num_labels:
        given.append(f"pad_token_id={load['pad_token_id']}")
    return ", ".join(given)


def _decoding(sealed: Sealed) -> str:
    """The arguments of decoding that the base's authors ship, for whoever wants them."""
    arguments = {} if sealed.num_labels else adapter.decoding_arguments(sealed)
    written = [f"{name}: {json.dumps(value)}".replace("`", "'") for name, value in arguments.items()]
    return ", ".join(f"`{one if len(one) <= 80 else one[:79] + '…'}`" for one in written)


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
        weights = f"`{entry.files[WEIGHTS][:16]}`"
        grew = parents or f"{sealed.base_id or 'the base'} (`{entry.base_hash}`)"
        lines.append(f"| {entry.stage} | {entry.kind} | {grew} | {names} | {used} | {hashes} | {weights} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text as it stands, in a cell of a table. Part of a lineage may be somebody else's words."""
    return html.escape(re.sub(r"([\\`\[|])", r"\\\1", text), quote=False)


def _checked(numbers: Json) -> str:
    """What the gate measured of one file."""

    def figure(value: Any) -> str:
        return str(value) if isinstance(value, int) or value == 0 else f"{value:.2g}"

    return ", ".join(f"{what} {figure(numbers[key])}" for key, what in CHECKED.items() if key in numbers)


def _cost(sealed: Sealed) -> str:
    lines = ["| stage | seconds | peak memory | on |", "| --- " * 4 + "|"]
    for entry in sealed.known:
        peak = f"{entry.peak_memory_mib} MiB ({entry.peak_memory_is})"
        lines.append(f"| {entry.stage} | {entry.seconds} | {_cell(peak)} | {_cell(entry.device)} |")
    versions = _cell(", ".join(f"{name} {version}" for name, version in sealed.known[-1].versions.items()))
    return "\n".join(lines) + f"\n\nTrained with {versions}."


def _rank(sealed: Sealed) -> int:
    """The smallest rank that vLLM knows and the adapter fits in."""
    own = int(sealed.model.lora.get("r", 8))
    return next((rank for rank in (8, 16, 32, 64, 128, 256) if rank >= own), own)


def _hub_datasets(sealed: Sealed) -> list[str]:
    names = []
    for entry in sealed.known:
        data = entry.section["data"]
        named = {f"mix[{number}]": part["path"] for number, part in enumerate(data.get("mix") or [])}
        named |= {role: data.get(role) for role in ("path", "test")}
        on_hub = [named.get(role) for role, sha in entry.data_hashes.items() if str(sha).startswith("hub:")]
        names += [name for name in on_hub if isinstance(name, str)]
    return list(dict.fromkeys(names))


def _license(sealed: Sealed) -> str | None:
    """The base's licence: from its own card beside the weights, else from the Hub."""
    from huggingface_hub import HfApi, ModelCard

    own = Path(sealed.model.base) / "README.md"
    try:
        if own.is_file():
            license_ = ModelCard.load(own).data.license
        else:
            info = HfApi().model_info(sealed.base_id, timeout=10) if sealed.base_id else None
            license_ = info.card_data.license if info and info.card_data else None
    except Exception:  # no Hub, or a card that is no YAML: the licence is not known
        return None
    return str(license_) if license_ else None
