"""docs/models.md, of what scripts/model_support.py found."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from model_families import FAMILIES

Json = dict[str, Any]
ABOUT = """# Models

Which models work? For each family, `scripts/model_support.py` makes a tiny model with random weights from the family's
own class in transformers, and a tiny tokenizer with the family's special tokens and chat template. Then it tries what
OneBase does with them. Nothing was tried with the published weights, and nothing on a GPU.

Chat templates are those that TRL ships. For Phi 4, Mistral, SmolLM3, Granite and OLMo it ships none: there the script
has short ones with the same marks. For GLM it is `recipes/templates/glm4.jinja`.

{made}

## What is understood

- **Loads**: in nf4. In transformers 5 experts are tensors of three dimensions, which 4 bits do not reach. They stay in
  16 bits, and they are most of such a model.
- **Template**: SFT's loss falls on what the assistant says and on the end of its turn, and nowhere else.
- **Packed batches**: a batch without padding gives the log-probabilities of each row alone, within {tolerance:g} in
  float32. `padded` means that the batch is computed with padding, and that this is as exact.
- **Sampling**: a sampled token has the log-probability that a pass over its answer alone gives, within {sampled:g}.
- **Plan**: what `onebase plan` computes by, for sft of the published model with 2 rows of 1024 tokens and all layers
  checkpointed. In brackets: by how much the worst entry is off a count of live bytes (two layers of these widths).

{first}

What `all-linear` puts an adapter on:

{targets}

## Stages

Two steps of each stage in float32, with all its checks. `ppo` is paid by the reward stage's model where there is one,
else by a function. Where a word stands beside `yes`, the stage is refused by name without it.

{second}

## What to know

- **Layers that carry a state along a row** (LFM2, Qwen 3.5, Granite 4 H) would carry it from one packed row into the
  next. transformers' gpt-oss and Granite 4 (dense) let packed rows see each other too. So `pretrain`, which packs, is
  refused there until you set `packing: false`. Whether packed rows stay apart is also tried on the loaded model before
  a stage trains on them.
- **Experts in bfloat16**: on the tiny Qwen 3 MoE in bfloat16, `dpo` was stopped by its check before the first step:
  policy and reference differed by 0.04 nats. In float32 they are equal. Why was not looked into.
- **Mistral Small 3.x and Ministral 3** are published as models that also see, and transformers loads no language model
  of their text part. They are refused before anything is loaded.
- **gpt-oss** is published in mxfp4, which cannot be quantised to nf4 again. It needs a copy with 16-bit weights, and
  `model.attn_implementation: eager`.
- **GLM 4**: its own template ends no turn. `model.chat_template: recipes/templates/glm4.jinja` does, with the mark at
  which GLM stops. It writes no thoughts.
- **Granite 4**: TRL cannot compute the balance loss of its experts. Set `router_aux_loss_coef: 0.0`.
- **Gemma 3 (4B to 27B) and Gemma 4** are loaded whole. Their parts that see and hear get no adapter.
- **Gemma 4 (E2B, E4B)**: its last layers share keys and values. Under activation checkpointing these hold the graph
  that holds them, so they stay in memory after a step. How much a long run loses has not been measured.
- **Phi 4 mini**: where a batch has a row longer than 4096 tokens, transformers computes all its rows with the factors
  for long rows.
- **DeepSeek R1 distills**: the template asks for a thought and leaves thoughts out of the history. SFT teaches the
  answer without one.
"""
USUAL = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo")
UNDERSTOOD = ("loads", "template", "ends of turn", "packed batches", "sampling", "plan")


def page_of(found: dict[str, Json], tolerance: float) -> str:
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")
    )
    day = datetime.now(UTC).date().isoformat()
    families = {family.name: family for family in FAMILIES}
    targets = [
        f"- {name}: {cells['targets']}"
        for name, cells in found.items()
        if cells.get("targets", "no") not in ("no", USUAL)
    ]
    return ABOUT.format(
        made=f"`python scripts/model_support.py --write docs/models.md`, {day}, on a CPU:\n{libraries}.",
        tolerance=tolerance,
        sampled=10 * tolerance,
        first=_table(found, UNDERSTOOD, lambda name: f"{name} (`{families[name].published}`)"),
        targets="\n".join([f"- all families that are not named below: {USUAL}", *targets]),
        second=_table(found, STAGES, str),
    )


def _table(found: dict[str, Json], columns: tuple[str, ...], named: Callable[[str], str]) -> str:
    lines = [["family", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [named(name), *(str(cells.get(column, "")).replace("|", "\\|") for column in columns)]
        for name, cells in found.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
