"""Families whose layers, wrappers or templates differ from Llama's, tried by the script that makes docs/models.md: its
references are transformers' eager attention on one row at a time, and what each family's marks say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import model_support
from model_families import FAMILIES

from pipeline.errors import UserError

BY_NAME = {family.name: family for family in FAMILIES}


def cells(name: str, *columns: str) -> dict[str, Any]:
    return model_support.try_family(BY_NAME[name], lambda found: None, list(columns))


def test_layers_that_carry_a_state_are_sampled_and_never_packed() -> None:
    found = cells("LFM2", "template", "packed batches", "packed documents", "sampling", "pretrain")
    assert found["template"] == found["sampling"] == "yes"
    assert found["packed batches"] == "padded (conv layers)"
    assert "see each other" in found["packed documents"]  # what a stage must not train on
    assert found["pretrain"] == "yes, with `packing: false`"


def test_a_model_that_also_sees_is_trained_where_text_passes() -> None:
    found = cells("Gemma 3 (4B to 27B)", "loads", "targets", "packed batches", "packed documents", "sft")
    usual = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert found == {**dict.fromkeys(found, "yes"), "targets": usual}


def test_experts_are_packed_and_said_to_stay_whole() -> None:
    found = cells("Qwen 3 MoE", "loads", "packed batches", "targets")
    assert found["loads"] == "yes, its experts not in 4 bits"
    assert found["packed batches"] == "yes"
    assert "experts.gate_up_proj" in found["targets"]


def test_packed_rows_that_see_each_other_are_found_on_the_loaded_model() -> None:
    """gpt-oss has no layer that says so in its config.json."""
    found = cells("gpt-oss", "packed documents", "pretrain")
    assert "see each other" in found["packed documents"]
    assert found["pretrain"] == "yes, with `packing: false`"


@pytest.mark.parametrize(
    ("name", "columns", "said"),
    [
        ("Qwen 3.5", ("reward", "ppo"), "yes"),  # the reward model lies on the policy's layers, not on the wrapper's
        ("Granite 4 (dense)", ("dpo",), "yes, with `router_aux_loss_coef: 0.0`"),
        ("GLM 4 (9B, 32B)", ("template", "sft"), "yes"),  # by recipes/templates/glm4.jinja
    ],
)
def test_stages_on_families_of_their_own_kind(name: str, columns: tuple[str, ...], said: str) -> None:
    assert cells(name, *columns) == dict.fromkeys(columns, said)


def test_the_script_tries_each_family_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Gemma 4's last layers leave out places that no logits are asked of. Under checkpointing its keys and values,
    which layers share, hold the graph that holds them: the model outlives its run."""
    script, file = ROOT / "scripts" / "model_support.py", tmp_path / "cells.json"
    said = [sys.executable, str(script), "--only", "Gemma 4 (E2B", "--column", "ppo", "--json", str(file)]
    shown = subprocess.run(said, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(file.read_text()) == {"Gemma 4 (E2B, E4B)": {"ppo": "yes"}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mistral3"}, "of which transformers loads no causal language model"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "published in mxfp4, which cannot be quantised to nf4"),
        ({"layer_types": ["conv", "full_attention"]}, "stages.pretrain.train.packing: .* has conv layers. Use -o"),
        ({"text_config": {"layer_types": ["linear_attention"]}}, "stages.pretrain.train.packing: .* linear_attention"),
    ],
)
def test_what_a_base_cannot_do_is_said_from_its_config(
    tiny_base: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    from pipeline.recipe.recipe import build
    from pipeline.stages.check import check_base

    whole = {**json.loads((tiny_base / "config.json").read_text()), **config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    (tmp_path / "rows.jsonl").write_text('{"text": "far out at sea"}\n')
    section = {"data": {"path": str(tmp_path / "rows.jsonl")}}
    recipe = build({"name": "r", "model": {"base": str(tmp_path)}, "stages": {"pretrain": section}})
    with pytest.raises(UserError, match=said):
        check_base(recipe.spec.model, recipe.stages)
    if "packing" in said:  # and the way out is one
        apart = build(
            {
                "name": "r",
                "model": {"base": str(tmp_path)},
                "stages": {"pretrain": {**section, "train": {"packing": False}}},
            }
        )
        check_base(apart.spec.model, apart.stages)
