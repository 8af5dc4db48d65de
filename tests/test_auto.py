"""`auto` finds the fastest setting that fits, keeps the effective batch, and is no matter of luck."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from conftest import launch, tiny_tree, write_recipe
from plan_oracle import MODELS
from safetensors.torch import load_file

from pipeline.data.load import DataSpec
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.plan import auto
from pipeline.plan.cards import Card, find_card
from pipeline.plan.lengths import lengths_of
from pipeline.plan.memory import memory
from pipeline.plan.shapes import shapes_of
from pipeline.plan.stage import plan_stage, planned_model, work_of
from pipeline.recipe.recipe import build, read
from pipeline.runs import choose
from pipeline.runs.recipe_file import describe_choices
from pipeline.runs.stage import run_stage
from pipeline.stages import STAGES
from pipeline.stages.stage import StageSpec

SPEC = ModelSpec(base="x")
MODEL = planned_model(SPEC, shapes_of(MODELS["Llama-3.1-8B"]))
ALL = {"per_device_train_batch_size": "auto", "activation_checkpointing": "auto", "gradient_accumulation_steps": 16}


def section(kind: str, **train: Any) -> StageSpec:
    paid = {"reward": "reward"} if kind == "ppo" else {}
    return STAGES[kind].section(data=DataSpec(path="somewhere/else"), train=train, **paid)


def chosen(kind: str, where: str, **train: Any) -> tuple[dict[str, Any], float, float]:
    """What was chosen, and the stage's total with it, as a share of the card, with one layer less checkpointed too."""
    asked = section(kind, **train)
    found = auto.choose(STAGES[kind], asked, MODEL, SPEC, None, find_card(where))
    work = work_of(STAGES[kind], auto.fill_in(asked, found), MODEL, SPEC, None)
    less = [memory(MODEL, w).total / find_card(where).room for w in (work, _lighter(work))]
    return found, less[0], less[1]


def _lighter(work: Any) -> Any:
    from dataclasses import replace

    return replace(work, checkpointed=max(0, work.checkpointed - 1))


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
@pytest.mark.parametrize("where", ["10GB", "rtx3060", "rtx4090", "h100"])
def test_what_is_chosen_fits_and_keeps_the_batch(kind: str, where: str) -> None:
    found, share, lighter = chosen(kind, where, max_length=1024, **ALL)
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 16
    assert share <= 0.95
    layers = found["activation_checkpointing"]
    assert layers is False or lighter > 0.95, "a layer less would have fitted too"


def test_more_room_is_used() -> None:
    """8B at 2048 tokens: the more memory, the fewer layers are checkpointed, and none where there is room."""
    found = [chosen("sft", where, max_length=2048, **ALL)[0] for where in ("9GB", "16GB", "20GB", "80GB")]
    levels = [32 if f["activation_checkpointing"] is True else int(f["activation_checkpointing"]) for f in found]
    assert levels[0] > levels[1] > levels[2] > levels[3] == 0
    assert found[3]["per_device_train_batch_size"] > found[0]["per_device_train_batch_size"]


def test_the_longest_rows_that_fit() -> None:
    train = {"activation_checkpointing": True, "per_device_train_batch_size": 1, "max_length": "auto"}
    lengths = [chosen("sft", where, **train)[0]["max_length"] for where in ("8GB", "9GB", "12GB")]
    assert 64 <= lengths[0] < lengths[1] < lengths[2] == auto.UNKNOWN_LENGTH


def test_no_longer_than_the_window() -> None:
    from dataclasses import replace

    model = replace(MODEL, shapes=replace(MODEL.shapes, window=2048))
    asked = section("sft", activation_checkpointing=True, per_device_train_batch_size=1, max_length="auto")
    assert auto.choose(STAGES["sft"], asked, model, SPEC, None, find_card("24GB"))["max_length"] == 2048


QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
BASES = {
    "Qwen/Qwen3-8B-Base": QWEN3_8B,
    "HuggingFaceTB/SmolLM2-1.7B": MODELS["SmolLM2-1.7B"],
    "HuggingFaceTB/SmolLM3-3B-Base": MODELS["SmolLM3-3B"],
}


@pytest.mark.parametrize("file", sorted(Path("recipes/cards").glob("*.yaml")), ids=lambda file: file.stem)
def test_card_profiles_say_what_is_planned(file: Path) -> None:
    """Every stage fits the card that the profile is for, and the totals in its head are the planner's."""
    text = file.read_text(encoding="utf-8")
    where = re.search(r"--gpu (\S+)", text)
    stated = re.search(r"# +total on the GPU +([\d. ]+)", text)
    assert where and stated
    recipe = read(file)
    spec = recipe.spec.model
    model = planned_model(spec, shapes_of(BASES[spec.base]))
    planned = {}
    for name in recipe.order():
        kind, asked = recipe.kind(name), recipe.stages[name]
        lengths = lengths_of(asked, kind.contract, recipe.spec.seed)
        found = auto.resolve(kind, asked, model, spec, lengths, find_card(where[1]))
        planned[name] = plan_stage(kind, found, model, spec, lengths, find_card(where[1]))
    assert all(stage.fits for stage in planned.values())
    assert [f"{stage.memory.total / 2**30:.2f}" for stage in planned.values()] == stated[1].split()


def test_ppo_divides_its_minibatch() -> None:
    words = {word: value for word, value in ALL.items() if value == "auto"}
    found, share, _ = chosen("ppo", "12GB", batch_size=48, **words)
    assert 48 % found["per_device_train_batch_size"] == 0 and "gradient_accumulation_steps" not in found
    assert share <= 0.95


def test_nothing_fits_says_by_how_much() -> None:
    with pytest.raises(UserError, match=r"the smallest setting needs \d+\.\d GiB, \d+\.\d GiB more than there is"):
        chosen("sft", "6GB", max_length=1024, **ALL)


def test_the_batch_must_be_said(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["train"]["per_device_train_batch_size"] = "auto"
    with pytest.raises(
        UserError, match=r"stages.pretrain.train.per_device_train_batch_size: is auto; then give gradient_acc"
    ):
        build(tree)


def test_a_choice_is_kept_and_is_no_part_of_the_fingerprint(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"sft": {**tree["stages"]["sft"], "train": {"max_steps": 2, **ALL, "max_length": "auto"}}}
    tree["stages"]["sft"].pop("from")
    tree["train"].pop("gradient_checkpointing")
    recipe = build(tree)
    monkeypatch.setattr(choose, "_this_machine", lambda: Card("a card", 2 << 30))
    run_stage(recipe, "sft", tmp_path)
    folder = tmp_path / "tiny" / "sft"
    manifest = json.loads((folder / "manifest.json").read_text())
    train = manifest["section"]["train"]
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 16
    assert manifest["parts"]["stage"]["train"]["per_device_train_batch_size"] == "auto"
    noted = describe_choices(recipe.artifact("sft", tmp_path), manifest["fingerprint"])
    assert f"# stages.sft.train.max_length: {train['max_length']}\n" in noted
    # on a larger card what was begun goes on as it was begun
    monkeypatch.setattr(choose, "_this_machine", lambda: Card("another card", 80 << 30))
    everyone = PartialState(cpu=True)
    again = choose.choose_section(recipe, "sft", recipe.spec.model, tmp_path, manifest["fingerprint"], everyone)
    assert again.train == train


TWO_CARDS = """
import json, os, sys
from pathlib import Path
from accelerate import PartialState
from pipeline.disk.atomic import write_json
from pipeline.models import dtype
from pipeline.runs import choose
from pipeline.runs.dtype import settle_run
from pipeline.plan.cards import Card
from pipeline.recipe.recipe import read

everyone, asked = PartialState(cpu=True), []
rank = everyone.process_index

def machine():
    asked.append(rank)
    return Card("a card", (2, 80)[rank] << 30)

choose._this_machine = machine
recipe, runs = read(sys.argv[1]), Path(sys.argv[2])
os.environ["ONEBASE_CACHE"] = str(runs / f"cache-{rank}")
write_json(dtype._memory(64, 128), {"dtype": ("float32", "bfloat16")[rank], "why": "it was measured"})
model = settle_run(recipe, runs, everyone)
section = choose.choose_section(recipe, "sft", model, runs, "f", everyone)
(runs / f"{rank}.json").write_text(json.dumps([{**section.train, "dtype": model.dtype}, asked]))
everyone.wait_for_everyone()
everyone.destroy_process_group()  # else a process may die of threads that still talk to the other
"""


def test_the_first_process_chooses_for_all(tiny_base: Path, tmp_path: Path) -> None:
    """Two processes, of which each would choose otherwise for the memory that it sees, and for what it remembers."""
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"].pop("dtype")
    tree["stages"] = {"sft": {**tree["stages"]["sft"], "train": {**ALL, "max_length": "auto"}}}
    tree["stages"]["sft"].pop("from")
    tree["train"] = {}
    (tmp_path / "two.py").write_text(TWO_CARDS)
    path = write_recipe(tree, tmp_path / "two.yaml")
    launch(2, tmp_path / "two.py", path, tmp_path)
    (first, asked), (second, asked_too) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and isinstance(first["per_device_train_batch_size"], int)
    assert first["dtype"] == "float32"
    assert (asked, asked_too) == ([0], [])


def test_some_layers_checkpointed_train_the_same_adapter(tiny_base: Path, tmp_path: Path) -> None:
    weights = {}
    for layers in (False, 1, True):
        tree = tiny_tree(tiny_base, tmp_path, name=f"with-{layers}")
        tree["model"] |= {"dtype": "float32", "quantize": "none"}
        train = {"max_steps": 2, "activation_checkpointing": layers}
        tree["stages"] = {"dpo": {"data": tree["stages"]["dpo"]["data"], "train": train}}
        run_stage(build(tree), "dpo", tmp_path)
        weights[layers] = load_file(tmp_path / f"with-{layers}" / "dpo" / "adapter" / "adapter_model.safetensors")
    for layers in (1, True):
        worst = max((weights[False][name] - weights[layers][name]).abs().max().item() for name in weights[False])
        assert worst < 1e-6
