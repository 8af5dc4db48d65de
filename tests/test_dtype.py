"""`model.dtype: auto` is what is faster here, and one and the same for all that a run is made of."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_tree
from rich.console import Console

from pipeline.disk.atomic import digest
from pipeline.errors import UserError
from pipeline.evaluate.plan import plan
from pipeline.models import dtype
from pipeline.models.spec import ModelSpec
from pipeline.publish.sealed import read_sealed
from pipeline.recipe.recipe import Recipe, build
from pipeline.recipe.yaml import dump
from pipeline.runs.dtype import settle
from pipeline.runs.stage import run_stage
from pipeline.terminal.chat import open_chat
from pipeline.terminal.plan import show_plan
from pipeline.training import trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is about what a CPU computes in")
AVX2 = "model name\t: Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz\nflags\t\t: fpu sse4_2 avx f16c rdrand fma avx2 bmi2\n"
TIMED = """
import json, time
import torch
from pipeline.models import dtype

def layer_and_back(kind):
    layer = torch.nn.Linear(576, 1536, bias=False, dtype=kind).requires_grad_(False)
    hidden = torch.randn(300, 576, dtype=kind, requires_grad=True)
    begun = time.perf_counter()
    layer(hidden).sum().backward()
    return time.perf_counter() - begun

seconds = {}
for kind in ("float32", "bfloat16") * 8:
    seconds[kind] = min(seconds.get(kind, 9.0), layer_and_back(getattr(torch, kind)))
took = []
for _ in range(3):
    begun = time.perf_counter()
    dtype.race(576, 1536)
    took.append(time.perf_counter() - begun)
print(json.dumps([dtype.choose(576, 1536).dtype, seconds, min(took), dtype.known_for_cpu(576, 1536).dtype]))
"""


@pytest.mark.parametrize("instructions", ["ALL", "AVX2"])
def test_the_faster_one_is_chosen_and_remembered(instructions: str, tmp_path: Path) -> None:
    """As a layer's forward and backward pass sees it. Confined to AVX2 this CPU emulates bfloat16, as older ones do."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ONEBASE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", TIMED]
    done = subprocess.run(
        command, env={**environment, "ONEDNN_MAX_CPU_ISA": instructions}, capture_output=True, text=True, check=True
    )
    chosen, seconds, took, remembered = json.loads(done.stdout)
    assert took < 0.5 or instructions == "AVX2"
    assert chosen == remembered
    other = "float32" if chosen == "bfloat16" else "bfloat16"
    assert seconds[chosen] < 1.5 * seconds[other], "the other is clearly faster"
    if seconds["bfloat16"] > 3 * seconds["float32"]:
        assert chosen == "float32"


def test_close_calls_go_to_half_the_memory() -> None:
    assert [dtype.decide(1.0, seconds).dtype for seconds in (0.5, 1.09, 1.11)] == ["bfloat16", "bfloat16", "float32"]
    assert str(dtype.decide(1.0, 1.8)) == "computes in float32: 1.8 times as fast as bfloat16 here"


def test_without_instructions_for_bfloat16_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(AVX2)
    monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    assert dtype.choose(64, 128).dtype == "float32" and not (tmp_path / "cache").exists()


@pytest.fixture
def remember(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Have this machine choose a dtype, as if it had measured so."""
    (tmp_path / "cpuinfo").write_text(AVX2.replace("avx2", "avx2 avx512_bf16"))
    monkeypatch.setattr(dtype, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))

    def edited(wanted: str) -> None:
        dtype.choose(64, 128)
        (noted,) = (tmp_path / "cache" / "dtype").iterdir()
        noted.write_text(json.dumps({**json.loads(noted.read_text()), "dtype": wanted}))

    return edited


def chain(base: Path, folder: Path, name: str = "tiny") -> Recipe:
    """Two chains, one of two stages; nothing is said of the dtype."""
    tree = tiny_tree(base, folder, name)
    tree["model"].pop("dtype")
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "dpo", "reward")}
    tree["train"] |= {"max_steps": 2, "save_steps": 1}
    for name, stage in tree["stages"].items():
        stage["train"] = {}
        if name != "dpo":
            stage.pop("from")
    tree["stages"]["sft"].pop("questions")
    return build(tree)


def planned(recipe: Recipe, runs: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_plan(recipe, runs, None, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_run_keeps_what_it_began_with(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remember: Any
) -> None:
    """A stage cut short, its child and a chain of its own, though the machine would by now choose otherwise."""
    recipe = chain(tiny_base, tmp_path)
    assert "planned as float32: the most it takes on a CPU" in planned(recipe, tmp_path)
    remember("float32")
    with monkeypatch.context() as planted:
        planted.setattr(trainer, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(recipe, "sft", tmp_path)
    remember("bfloat16")
    assert "planned as float32: as in 'sft'" in planned(recipe, tmp_path)
    for stage in recipe.order():
        run_stage(recipe, stage, tmp_path)
    manifests = {stage: recipe.artifact(stage, tmp_path).verify() for stage in recipe.stages}
    assert {manifest.dtype for manifest in manifests.values()} == {"float32"}
    assert len({manifest.base_digest for manifest in manifests.values()}) == 1
    assert {manifest.parts.model["dtype"] for manifest in manifests.values()} == {"auto"}
    # whatever reads the run takes it from there
    assert read_sealed(recipe, "dpo", tmp_path).model.dtype == "float32"
    assert {measure.model["dtype"] for measure in plan(recipe, tmp_path)} == {"float32"}
    (tmp_path / "tiny" / "recipe.yaml").write_text(dump(recipe.tree))
    for policies in (["dpo"], ["base"]):
        chat = open_chat(tmp_path / "tiny", policies, tmp_path / "c.jsonl", 4, 0.0)
        assert chat.bench.model.get_input_embeddings().weight.dtype is torch.float32
    # a run that begins now takes what is chosen now, and an adapter of it is no part of this one
    other = chain(tiny_base, tmp_path, "other")
    run_stage(other, "sft", tmp_path)
    assert other.artifact("sft", tmp_path).verify().dtype == "bfloat16"
    sft = other.artifact("sft", tmp_path).folder
    sft.rename(tmp_path / "kept")
    (recipe.artifact("sft", tmp_path).folder).rename(sft)
    (tmp_path / "kept").rename(recipe.artifact("sft", tmp_path).folder)
    recipe.artifact("reward", tmp_path).claim(digest("another"), {})
    with pytest.raises(UserError, match=r"model.dtype: auto .* 'sft' in bfloat16, 'dpo' in float32\. Name one"):
        run_stage(recipe, "reward", tmp_path)


def test_what_a_recipe_says_is_taken(tiny_base: Path) -> None:
    said = ModelSpec(base=str(tiny_base), dtype="bfloat16")
    assert settle(said, {"sft": "float32"}) is said
