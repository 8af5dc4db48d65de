"""A recipe's mistakes are named with file, line and dotted key, before torch is imported."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny_tree, write_recipe

from pipeline.errors import UserError
from pipeline.recipe import yaml
from pipeline.recipe.recipe import build, read
from pipeline.runs import environment, sharding
from pipeline.runs.runner import run
from pipeline.runs.stage import run_stage

GOOD = """\
name: t
model:
  base: {base}
stages:
  pretrain:
    data: {{path: data/corpus.jsonl}}
    train: {{learning_rate: 1e-5}}
  sft:
    from: pretrain
    data: {{path: data/demonstrations.jsonl}}
"""


@pytest.fixture
def good(tmp_path: Path, tiny_base: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD.format(base=tiny_base))
    return path


def test_floats_are_numbers_and_overrides_apply(good: Path) -> None:
    recipe = read(good, "stages.sft.train.learning_rate=5e-6", "seed=3")
    assert recipe.stages["pretrain"].train["learning_rate"] == 1e-5
    assert recipe.stages["sft"].train["learning_rate"] == 5e-6
    assert recipe.spec.seed == 3


@pytest.mark.parametrize(
    ("change", "line", "key", "says"),
    [
        (("learning_rate", "learning_rat"), 7, "stages.pretrain.train.learning_rat", "did you mean 'learning_rate'"),
        (("  base:", "  bass:"), 3, "model.bass", "did you mean 'base'"),
        (("    from: pretrain", "    from: pretrian"), 9, "stages.sft.from", "did you mean 'pretrain'"),
        (("  sft:", "  stf:"), 8, "stages.stf", "there is no stage 'stf'"),
        (("name: t", "name: a/b"), 1, "name", "a-z, A-Z, 0-9"),
        (("path: data/d", "paht: data/d"), 10, "stages.sft.data.paht", "did you mean 'path'"),
        (("1e-5", "'1e-5'"), 7, "stages.pretrain.train.learning_rate", "without quotes"),
        (("learning_rate: 1e-5", "output_dir: x"), 7, "stages.pretrain.train.output_dir", "set by the runner"),
        (("1e-5", "abc"), 7, "stages.pretrain.train.learning_rate", "expected a number of at least 0"),
        (
            ("learning_rate: 1e-5", "max_length: -1"),
            7,
            "stages.pretrain.train.max_length",
            "a whole number of at least 1",
        ),
        (("1e-5", "2020-01-01"), 7, "stages.pretrain.train.learning_rate", "is read as date"),
        (("  base:", "  lora: {inference_mode: true}\n  base:"), 3, "model.lora.inference_mode", "set by the stage"),
        (("learning_rate: 1e-5", "hub_token: x"), 7, "stages.pretrain.train.hub_token", "does not belong"),
        (("learning_rate: 1e-5", "deepspeed: z3.json"), 7, "stages.pretrain.train.deepspeed", "is not supported"),
        (("learning_rate: 1e-5", "fsdp: full_shard"), 7, "stages.pretrain.train.fsdp", "--launch-config recipes/acc"),
    ],
)
def test_mistakes_are_named(good: Path, change: tuple[str, str], line: int, key: str, says: str) -> None:
    good.write_text(good.read_text().replace(*change, 1))
    with pytest.raises(UserError) as caught:
        read(good)
    assert str(caught.value).startswith(f"{good}:{line}: {key}")
    assert says in str(caught.value)


def test_cycle_double_key_and_broken_yaml(good: Path) -> None:
    text = good.read_text()
    good.write_text(text.replace("  pretrain:\n", "  pretrain:\n    from: sft\n"))
    with pytest.raises(UserError, match="in a circle: .*sft.*pretrain"):
        read(good)
    good.write_text(text + "  sft: {}\n")
    with pytest.raises(UserError, match=r":11: .*'sft' is given twice"):
        read(good)
    good.write_text(text.replace("name: t", "name: &t t").replace("pretrain\n", "*t\n"))
    with pytest.raises(UserError, match="anchors and aliases .* are not allowed"):
        read(good)
    good.write_text(text + "  dpo: [\n")
    with pytest.raises(UserError, match="is not YAML"):
        read(good)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("distributed_type: FSDP\nnum_processes: 2\n", "distributed_type asks for FSDP"),
        ("distributed_type: MULTI_GPU\ndeepspeed_config: {zero_stage: 3}\n", "deepspeed_config asks for DeepSpeed"),
        ('{"distributed_type": "DEEPSPEED"}', "distributed_type asks for DeepSpeed"),
        ("distributed_type: [", "is not an accelerate config"),
    ],
)
def test_a_base_in_shards_is_refused_before_any_work(good: Path, tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "accelerate.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"{file}: {names}"):
        run(read(good), runs=tmp_path / "runs", launch_config=file)
    assert not (tmp_path / "runs").exists()


def test_a_variable_that_asks_for_shards_is_named(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharding.refuse(ROOT / "recipes" / "accelerate" / "ddp.yaml")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for start in (run, lambda recipe, runs: run_stage(recipe, "pretrain", runs)):
        with pytest.raises(
            UserError, match="ACCELERATE_USE_FSDP is set .* asks for FSDP.* recipes/accelerate/ddp.yaml"
        ):
            start(read(good), runs=tmp_path / "runs")


def test_cuda_memory_grows_in_segments_unless_the_person_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = importlib.util.find_spec("torch")
    assert torch and torch.origin
    reads = (Path(torch.origin).parent / "lib" / "libc10.so").read_bytes()
    assert all(name.encode() in reads for name in (*environment.GPU_ENVIRONMENT, *environment.ALLOCATORS))
    for name in environment.ALLOCATORS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(environment, "_has_gpu", lambda: True)
    assert environment.make_environment()["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert "PYTORCH_ALLOC_CONF" not in environment.make_environment()


def test_the_resolved_recipe_reads_back_as_the_same(good: Path, tmp_path: Path) -> None:
    from pipeline.recipe import yaml

    recipe = read(good, "model.revision='12e4'", "stages.sft.train.learning_rate=1e-7")
    (tmp_path / "again.yaml").write_text(yaml.dump(recipe.tree))
    assert read(tmp_path / "again.yaml").tree == recipe.tree


def test_a_reward_model_is_no_policy(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"]["dpo"]["from"] = "reward"
    with pytest.raises(UserError, match="stages.dpo.from: 'reward' leaves a reward model"):
        build(tree)


def test_shared_words_reach_the_stages_that_know_them(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["train"]["packing"] = False  # a word of SFTConfig, unknown to RewardConfig
    stages = build(tree).stages
    assert stages["sft"].train["packing"] is False
    assert "packing" not in stages["reward"].train
    with pytest.raises(UserError, match="train.no_such_word: unknown key"):
        build({**tree, "train": {"no_such_word": 1}})


def test_check_names_a_base_that_can_carry_no_reward_model(tiny_base: Path, tmp_path: Path) -> None:
    """transformers has no score head for Granite; a run would find out only after the stages before."""
    import shutil

    from transformers import AutoModelForSequenceClassification, GraniteConfig
    from typer.testing import CliRunner

    from pipeline.cli import app
    from pipeline.stages.check import check_base

    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_config(GraniteConfig())
    base = tmp_path / "granite"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "granite"}))
    tree = tiny_tree(base, tmp_path)
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    refused = CliRunner().invoke(app, ["check", str(recipe)])
    assert isinstance(refused.exception, UserError)
    assert "stages.reward: a base of the type 'granite'" in str(refused.exception)
    with pytest.raises(UserError, match="stages.reward: a base of the type 'granite'"):
        run(build(tree), runs=tmp_path / "runs")
    assert not (tmp_path / "runs" / "tiny" / "pretrain").exists()  # nothing has been trained for nothing
    del tree["stages"]["reward"]
    without = build(tree)
    check_base(without.spec.model, without.stages)


def test_words_are_those_of_the_installed_classes() -> None:
    import dataclasses

    import trl
    from peft import LoraConfig

    from pipeline.stages.arguments import words

    for config in (trl.SFTConfig, trl.RewardConfig, trl.DPOConfig, LoraConfig):
        fields = {field.name for field in dataclasses.fields(config) if field.init}
        assert fields <= words(config.__name__)
        # A word that only a parent declares by a default, and the class keeps for old recipes, is no field.
        assert len(words(config.__name__) - fields) < 12, words(config.__name__) - fields


def test_fork_shares_everything_before_it(tiny_base: Path, tmp_path: Path) -> None:
    recipe = build(tiny_tree(tiny_base, tmp_path)).fork("dpo", "dpo-gentle", "train.beta=0.5")
    parts = recipe.parts()
    assert recipe.stages["dpo-gentle"].train["beta"] == 0.5
    assert parts["dpo-gentle"]["parents"] == parts["dpo"]["parents"]
    assert parts["dpo-gentle"]["stage"] != parts["dpo"]["stage"]
    # What a run writes down for its stages' processes is the same recipe again.
    (tmp_path / "resolved.yaml").write_text(yaml.dump(recipe.tree))
    assert read(tmp_path / "resolved.yaml").parts() == parts


def test_fingerprints_follow_what_changes(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    before = build(tree).parts()
    changed = lambda *overrides: {n for n, p in build(tree, overrides).parts().items() if p != before[n]}  # noqa: E731
    assert changed("stages.dpo.train.beta=0.2") == {"dpo"}
    assert changed("stages.sft.train.learning_rate=1e-4") == {"sft", "reward", "dpo"}
    assert changed("stages.sft.train.logging_steps=50", "train.save_steps=7") == set()
    assert changed("seed=8") == {"pretrain", "sft", "reward", "dpo"}
    dialogues = Path(tree["stages"]["sft"]["data"]["path"])
    dialogues.write_text(dialogues.read_text().replace("I", "We", 1))
    assert {n for n, p in build(tree).parts().items() if p != before[n]} == {"sft", "reward", "dpo"}


def test_what_is_only_measured_on_is_no_part_of_the_training(tiny_base: Path, tmp_path: Path) -> None:
    """A share to hold out is taken from the rows that are trained on; a file of other rows is not."""
    tree = tiny_tree(tiny_base, tmp_path)
    before, measured = build(tree).parts(), build(tree).measured_on("dpo")
    Path(tree["stages"]["sft"]["questions"]).write_text('{"prompt": "q", "answer": "a"}\n')
    held_out = Path(tree["stages"]["dpo"]["data"]["test"])
    held_out.write_text("\n".join(held_out.read_text().splitlines()[1:]) + "\n")
    assert build(tree).parts() == before
    assert build(tree).measured_on("dpo").keys() == measured.keys() == {"test"}
    assert build(tree).measured_on("dpo") != measured
    tree["stages"]["reward"]["data"] = {"path": tree["stages"]["reward"]["data"]["path"]}  # no held-out file at all
    assert build(tree).parts() == before
    changed = build(tree, ["stages.pretrain.data.test=0.5", "stages.dpo.data.test=0.1"]).parts()
    assert {name for name in changed if changed[name]["stage"] != before[name]["stage"]} == {"pretrain", "dpo"}


REWARD = """
from pathlib import Path
import math, helper
from package.inner import unit

def pays(completions, **columns):
    words = (Path(__file__).parent / "words.txt").read_text().split()
    return [helper.count(c[0]["content"]) * unit() for c in completions]
"""


def test_a_reward_is_all_that_its_function_reads(tiny_base: Path, tmp_path: Path) -> None:
    """Modules beside it, those that they import, and files that one of them names; nothing else in the folder."""
    files = {
        "pays.py": REWARD,
        "helper.py": "def count(text):\n    import deeper\n    return len(text)\n",
        "deeper.py": "RULES = open('rules/list.json')\n",
        "package/__init__.py": "",
        "package/inner.py": "from . import near\n\ndef unit():\n    return 1.0\n",
        "package/near.py": "",
        "words.txt": "a b\n",
        "rules/list.json": "[]",
        "unused.py": "",
        "unused.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"ppo": {"reward": f"{tmp_path}/pays.py:pays", "data": {"path": "data/prompts.jsonl"}}}
    tree["train"] = {}
    before = build(tree).parts()
    counted = set()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n# changed\n")
        counted |= {name} if build(tree).parts() != before else set()
        (tmp_path / name).write_text(text)
    assert counted == files.keys() - {"unused.py", "unused.txt"}
    assert build(tree).parts() == before


def test_the_command_line_answers_at_once() -> None:
    onebase = [sys.executable, "-X", "importtime", "-m", "pipeline", "--help"]
    shown = subprocess.run(onebase, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "RECIPE" not in shown.stderr
    assert "torch" not in shown.stderr
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, check=True)
        took.append(time.perf_counter() - begun)
    assert min(took) < 0.5


def test_errors_have_status_2_and_no_traceback(tmp_path: Path) -> None:
    bad = write_recipe({"name": "x", "model": {"base": "nowhere/at/all"}, "stages": {}}, tmp_path / "bad.yaml")
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", str(bad)], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert shown.stderr.startswith("error: ") and "Traceback" not in shown.stderr


def test_what_is_no_recipe_is_told_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\x89PNG\xff")
    for path, reason in (
        (tmp_path / "nofile.yaml", "there is no file .*nofile.yaml"),
        (tmp_path, "is a folder: name its recipe, for example .*/recipe.yaml"),
        (tmp_path / "binary.yaml", "is no text in UTF-8"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            read(path)
        assert "Errno" not in str(caught.value)


def test_a_missing_file_of_rows_is_told_with_its_place_and_where_it_may_lie(tiny_base: Path, tmp_path: Path) -> None:
    from pipeline.runs.rows import load_rows

    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"sft": {"data": {"path": "dialogues.jsonl"}}}
    path = write_recipe(tree, tmp_path / "mine.yaml")
    line = 1 + path.read_text().splitlines().index('    "path": "dialogues.jsonl"')
    expected = (
        f"{path}:{line}: stages.sft.data.path: a file of that name is beside the recipe: {tmp_path}/dialogues.jsonl"
    )
    recipe = read(path)
    for refuse in (recipe.parts, lambda: load_rows(recipe, "sft")):
        with pytest.raises(UserError) as caught:
            refuse()
        assert str(caught.value).startswith(expected) and "no such file (looked in" in str(caught.value)


def test_weights_that_are_cut_short_or_missing_are_found_by_their_headers(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    from pipeline.stages.check import check_base

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    recipe = build(tiny_tree(base, tmp_path))
    check_base(recipe.spec.model, recipe.stages)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=f"model.safetensors is damaged or not whole: it has {cut} bytes"):
            check_base(recipe.spec.model, recipe.stages)
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks model-00002.safetensors"):
        check_base(recipe.spec.model, recipe.stages)


def test_a_file_that_cannot_be_written_is_named_and_not_its_temporary(tmp_path: Path) -> None:
    from pipeline.disk.atomic import write_text

    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(OSError, match=r"/mine\.yaml'$"):
        write_text(tmp_path / "mine.yaml", "x")
