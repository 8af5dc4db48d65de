"""A finished run on the tiny base, made once, for the tests that publish from it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from conftest import tiny_tree

from pipeline.disk.atomic import write_text
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.stage import run_stage

BASE_ID = "tester/tiny-base"
DECODING: dict[str, Any] = {
    "max_length": 30, "max_new_tokens": 3, "min_length": 200, "min_new_tokens": 9, "early_stopping": True,
    "max_time": 1e-6, "stop_strings": ["a", "e"], "do_sample": True, "num_beams": 2, "temperature": 0.6, "top_k": 5,
    "top_p": 0.5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01,
    "repetition_penalty": 1.9, "encoder_repetition_penalty": 1.9, "length_penalty": 2.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[5], [6]], "renormalize_logits": True, "forced_bos_token_id": 9, "forced_eos_token_id": 8,
    "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 1.5],
    "suppress_tokens": list(range(99, 400)), "begin_suppress_tokens": [7],
    "sequence_bias": [[[11], 9.0]], "token_healing": True, "guidance_scale": 1.5,
    "watermarking_config": {"bias": 5.0}, "num_return_sequences": 2, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "encoder_no_repeat_ngram_size": 2, "prompt_lookup_num_tokens": 3,
}  # fmt: skip
"""Every word by which a base's generation_config.json can change what is answered, or in which shape."""


def with_decoding_words(base: Path, to: Path) -> Path:
    """The same base, as its authors might ship it: with all of these words, and other special tokens."""
    shutil.copytree(base, to)
    config = {**DECODING, "eos_token_id": [0], "pad_token_id": 0, "bos_token_id": 0}
    (to / "generation_config.json").write_text(json.dumps(config))
    return to


def having_pulled(base: Path, folder: Path) -> dict[str, str]:
    """The environment of a machine that has pulled the base from the Hub before, and has no network now."""
    pulled = folder / "hub" / f"models--{BASE_ID.replace('/', '--')}"
    (pulled / "refs").mkdir(parents=True)
    (pulled / "refs" / "main").write_text("0" * 40)
    shutil.copytree(base, pulled / "snapshots" / ("0" * 40))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}


def finished_run(base: Path, runs: Path, *stages: str) -> Recipe:
    """The recipe of a run whose stages are trained and sealed below `runs`, hot enough that the adapter shows."""
    runs.mkdir(exist_ok=True)
    tree = json.loads(json.dumps(tiny_tree(base, runs)))  # no two sections share an object: recipes have no anchors
    tree["model"]["public_id"] = BASE_ID
    tree["model"]["chat_template"] = "recipes/templates/chatml.jinja"
    tree["train"]["learning_rate"] = 3e-3
    recipe = build(tree)
    for stage in recipe.order():
        if stage in stages:
            run_stage(recipe, stage, runs)
    write_text(runs / recipe.name / "recipe.yaml", yaml.dump(recipe.tree))
    return recipe
