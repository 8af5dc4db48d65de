"""Configs of three other trainers become recipes that build, and every word without a counterpart is told."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, onebase

from pipeline.bring import axolotl, llama_factory, trl
from pipeline.bring.importing import bring
from pipeline.bring.words import DTYPES, SHARED_REASONS, Words
from pipeline.errors import UserError
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe, read
from pipeline.stages.arguments import WHY_NOT
from pipeline.stages.arguments import words as trainer_words

LF = {
    "model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "finetuning_type": "lora", "cutoff_len": 700,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 3e-5,
    "num_train_epochs": 2, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
}  # fmt: skip
AXOLOTL = {
    "base_model": "Qwen/Qwen3-0.6B", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 64,
    "lora_dropout": 0.05, "lora_target_linear": True, "sequence_len": 900, "micro_batch_size": 2,
    "gradient_accumulation_steps": 8, "num_epochs": 3, "learning_rate": "2e-4", "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine", "warmup_steps": 20,
}  # fmt: skip
INFO = {
    "tasks": {"file_name": "tasks.json"},
    "docs": {"file_name": "docs.jsonl", "columns": {"prompt": "text"}},
    "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "conversations"}},
    "openai": {
        "hf_hub_url": "someone/chats", "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {
        "file_name": "pairs.json", "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
    },
    "odd": {"file_name": "odd.json", "columns": {"prompt": "frage", "response": "antwort"}},
}  # fmt: skip


def imported(
    folder: Path, capsys: pytest.CaptureFixture[str], *files: tuple[str, Any], builds: bool = True
) -> tuple[Recipe | dict[str, Any], dict[str, str]]:
    """The recipe (or its tree, where it cannot build yet), and what was told of each word."""
    paths = []
    for name, content in files:
        path = folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        paths.append(path)
    capsys.readouterr()
    (folder / "recipe.yaml").unlink(missing_ok=True)
    bring(paths, folder / "recipe.yaml")
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("the recipe is not sound") for line in told) is not builds
    left = {}
    for line in told:
        if line.startswith("  "):
            word, _, why = line.strip().partition("  ")
            left[word.partition(": ")[0]] = why
    whole = read(folder / "recipe.yaml") if builds else yaml.load(folder / "recipe.yaml")[0]
    return whole, left


def test_llama_factory_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **LF, "stage": "sft", "quantization_bit": 4, "lora_rank": 4, "lora_target": "q_proj,v_proj", "seed": 5,
        "dataset": "tasks,chats,openai", "max_samples": 50, "val_size": 0.1, "template": "qwen", "bf16": True,
        "output_dir": "saves/qwen/lora", "packing": True, "overwrite_cache": True, "made_up": 1,
    }  # fmt: skip
    recipe, left = imported(tmp_path, capsys, ("sft.yaml", config), ("dataset_info.json", INFO))
    sft, model = recipe.stages["sft"], recipe.spec.model
    assert recipe.name == "qwen-lora" and recipe.spec.seed == 5
    assert (model.quantize, model.dtype) == ("nf4", "bfloat16")
    assert model.lora == {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    assert [(part.path, part.format, part.limit) for part in sft.data.parts()] == [
        (str(tmp_path / "tasks.json"), "alpaca", 50), (str(tmp_path / "chats.json"), "sharegpt", 50),
        ("someone/chats", "openai", 50),
    ]  # fmt: skip
    assert sft.data.test == 0.1
    wanted = {"max_length": 700, "warmup_steps": 0.1, "packing": True, "gradient_checkpointing": True}
    wanted |= {word: LF[word] for word in ("learning_rate", "lr_scheduler_type", "num_train_epochs")}
    assert wanted.items() <= sft.train.items()
    assert left.keys() == {"template", "overwrite_cache", "made_up"}
    assert "no word of LLaMA-Factory" in left["made_up"]


def test_llama_factory_chain_of_four_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {**LF, "lora_target": "all"}
    pretrain = {**common, "stage": "pt", "dataset": "docs", "output_dir": "saves/pt"}
    sft = {**common, "stage": "sft", "dataset": "tasks", "adapter_name_or_path": "saves/pt/", "output_dir": "saves/sft"}
    dpo = {**common, "stage": "dpo", "dataset": "pairs", "adapter_name_or_path": "saves/sft", "output_dir": "saves/dpo"}
    reward = {
        **common,
        "stage": "rm",
        "dataset": "pairs",
        "adapter_name_or_path": "saves/sft",
        "output_dir": "saves/rm",
    }
    ppo = {
        **common, "stage": "ppo", "dataset": "tasks", "adapter_name_or_path": "saves/sft", "reward_model": "saves/rm",
        "max_new_tokens": 64, "ppo_epochs": 2, "top_p": 0.9,
    }  # fmt: skip
    files = [("ppo.yaml", ppo), ("pt.yaml", pretrain), ("dpo.yaml", {**dpo, "pref_beta": 0.2, "pref_loss": "ipo"})]
    files += [("rm.yaml", reward), ("sft.yaml", sft), ("dataset_info.json", INFO)]
    recipe, left = imported(tmp_path, capsys, *files)
    assert recipe.order() == ["pretrain", "sft", "reward", "dpo", "ppo"]
    assert {name: stage.from_ for name, stage in recipe.stages.items()} == {
        "pretrain": None, "sft": "pretrain", "reward": "sft", "dpo": "sft", "ppo": "sft",
    }  # fmt: skip
    assert recipe.stages["dpo"].train["beta"] == 0.2 and recipe.stages["dpo"].train["loss_type"] == ["ipo"]
    settings = recipe.stages["ppo"].sampling()
    assert settings is not None
    assert (settings.batch_size, settings.response_length, settings.num_ppo_epochs) == (8, 64, 2)
    assert recipe.spec.model.quantize == "none"
    assert left.keys() == {"top_p", "num_train_epochs"}


def test_llama_factory_without_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**LF, "stage": "ppo", "dataset": "nowhere", "reward_model": "saves/rm"}
    _, left = imported(tmp_path, capsys, ("ppo.yaml", config), builds=False)
    assert "give that config as a FILE" in left["saves/rm"] and "dataset_info.json" in left["dataset"]
    odd = {**LF, "stage": "orpo", "finetuning_type": "full", "dataset": "odd"}
    _, left = imported(tmp_path, capsys, ("odd.yaml", odd), ("dataset_info.json", INFO))
    assert (
        "frage" in left["odd.columns"] and "LoRA adapter" in left["finetuning_type"] and "sft is taken" in left["stage"]
    )


def test_axolotl_qlora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [
        {"path": "a.jsonl", "type": "alpaca", "ds_type": "json"},
        {"path": "b.jsonl", "type": "chat_template", "field_messages": "conversations",
         "message_property_mappings": {"role": "from", "content": "value"}},
        {"path": "json", "data_files": "c.jsonl", "type": "chat_template", "roles_to_train": ["assistant"]},
    ]  # fmt: skip
    config = {
        **AXOLOTL, "datasets": sets, "val_set_size": 0.05, "sample_packing": True, "flash_attention": True,
        "bf16": "auto", "gradient_checkpointing": True, "special_tokens": {"pad_token": "<pad>"}, "wandb_project": "x",
        "wandb_name": "first", "wandb_entity": "us",
        "output_dir": "./outputs/mine", "saves_per_epoch": 1, "frob": True, "deepspeed": "zero.json", "debug": None,
    }  # fmt: skip
    recipe, left = imported(tmp_path, capsys, ("a.yml", config))
    sft = recipe.stages["sft"]
    assert recipe.name == "mine" and recipe.spec.model.attn_implementation == "sdpa"
    assert recipe.spec.model.lora["target_modules"] == "all-linear" and recipe.spec.model.quantize == "nf4"
    assert [(part.path, part.format) for part in sft.data.parts()] == [
        ("a.jsonl", "alpaca"), ("b.jsonl", "sharegpt"), ("c.jsonl", "openai"),
    ]  # fmt: skip
    wanted = {
        "learning_rate": 2e-4, "num_train_epochs": 3, "optim": "adamw_bnb_8bit", "warmup_steps": 20, "packing": True,
        "max_length": 900, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
        "report_to": "wandb", "project": "x", "run_name": "first",
    }  # fmt: skip
    assert wanted.items() <= sft.train.items()
    nested = {"datasets[0].ds_type", "datasets[2].roles_to_train"}
    assert (
        left.keys()
        == {"special_tokens", "wandb_entity", "saves_per_epoch", "frob", "deepspeed", "flash_attention"} | nested
    )


def test_axolotl_dpo_and_its_like(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [{"path": "pairs.jsonl", "type": "llama3.argilla_chat"}]
    recipe, left = imported(tmp_path, capsys, ("a.yml", {**AXOLOTL, "rl": "dpo", "rl_beta": 0.2, "datasets": sets}))
    assert recipe.stages["dpo"].train["beta"] == 0.2 and recipe.stages["dpo"].data.format == "hh" and not left
    recipe, _ = imported(tmp_path, capsys, ("a.yml", {**AXOLOTL, "rl": "ipo", "datasets": sets}))
    assert recipe.stages["dpo"].train["loss_type"] == ["ipo"]
    recipe, left = imported(tmp_path, capsys, ("a.yml", {**AXOLOTL, "rl": "grpo", "datasets": sets}))
    assert "sft is taken" in left["rl"]
    fields = {
        "field_prompt": "prompt",
        "field_chosen": "chosen",
        "field_rejected": "rejected",
        "prompt_format": "{prompt}",
    }
    config = {**AXOLOTL, "rl": "dpo", "datasets": [{"path": "pairs.jsonl", "type": fields}]}
    recipe, left = imported(tmp_path, capsys, ("a.yml", config))
    assert recipe.stages["dpo"].data.format == "trl" and left.keys() == {"datasets[0].type[0].prompt_format"}


def test_answers_with_labels_go_to_kto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **AXOLOTL, "rl": "kto", "rl_beta": 0.2, "kto_undesirable_weight": 0.5,
        "datasets": [{"path": "labels.jsonl", "type": "llama3.prompt_pairs"}],
    }  # fmt: skip
    recipe, left = imported(tmp_path, capsys, ("a.yml", config))
    kto = recipe.stages["kto"]
    assert kto.data.format == "kto" and not left and kto.train["beta"] == 0.2 and kto.train["undesirable_weight"] == 0.5
    info = {
        "flat": {
            "file_name": "flat.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"},
        },
        "turns": {
            "file_name": "t.json",
            "formatting": "sharegpt",
            "columns": {"system": "persona", "kto_tag": "label"},
        },
    }
    config = {**LF, "stage": "kto", "dataset": "flat,turns", "kto_chosen_weight": 1.5}
    recipe, left = imported(tmp_path, capsys, ("k.yaml", config), ("dataset_info.json", info))
    kto = recipe.stages["kto"]
    assert [part.format for part in kto.data.parts()] == ["kto", "kto"]
    assert kto.train["beta"] == 0.1 and kto.train["desirable_weight"] == 1.5 and left.keys() == {"turns.columns"}
    text = "trl kto --model_name_or_path a/b --dataset_name c/d --use_peft --desirable_weight 2"
    recipe, left = imported(tmp_path, capsys, ("run.sh", text))
    assert recipe.stages["kto"].train == {"desirable_weight": 2} and not left
    imported(tmp_path, capsys, ("k.yaml", {**config, "per_device_train_batch_size": 1}), builds=False)


def test_axolotl_documents_and_full_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        **AXOLOTL,
        "adapter": None,
        "load_in_4bit": False,
        "datasets": [{"path": "d.jsonl", "type": "completion"}],
    }
    recipe, left = imported(tmp_path, capsys, ("a.yml", config))
    assert recipe.order() == ["pretrain"] and recipe.spec.model.quantize == "none"
    assert "LoRA adapter" in left["adapter"]


COMMAND = """CUDA_VISIBLE_DEVICES=0 trl dpo \\
  --model_name_or_path Qwen/Qwen3-0.6B --dataset_name someone/pairs --use_peft --lora_r 32 \\
  --lora_target_modules q_proj v_proj --load_in_4bit --learning_rate=5e-6 --beta 0.05 --gradient_checkpointing \\
  --bf16 --output_dir Qwen-DPO --eval_strategy steps --no_such_word 1   # a remark
"""


def test_trl_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, left = imported(tmp_path, capsys, ("run.sh", COMMAND))
    dpo = recipe.stages["dpo"]
    assert recipe.name == "Qwen-DPO" and dpo.data.path == "someone/pairs"
    assert dpo.train == {"learning_rate": 5e-6, "beta": 0.05, "gradient_checkpointing": True}
    assert recipe.spec.model.lora["target_modules"] == ["q_proj", "v_proj"] and recipe.spec.model.dtype == "bfloat16"
    assert left.keys() == {"command", "eval_strategy", "no_such_word"}


def test_trl_script_under_a_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "accelerate launch --num_processes 2 trl/scripts/reward.py --model_name_or_path a/b --dataset_name c/d"
    text += " --use_peft --center_rewards_coefficient 0.01 --max_length 512"
    recipe, left = imported(tmp_path, capsys, ("run.txt", text))
    assert recipe.stages["reward"].train == {"center_rewards_coefficient": 0.01, "max_length": 512}
    assert left.keys() == {"command"}


def test_trl_yaml_alone_and_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_name_or_path": "a/b", "use_peft": True, "packing": True, "max_length": 300, "torch_dtype": "bfloat16",
        "datasets": [{"path": "c/d", "fraction": 0.7}, {"path": "e/f", "fraction": 0.3, "columns": ["messages"]}],
        "test_split_size": 0.1, "hub_token": "hf_aSecretOfMine",
    }  # fmt: skip
    recipe, left = imported(tmp_path, capsys, ("c.yaml", config))
    assert [(part.path, part.weight) for part in recipe.stages["sft"].data.parts()] == [("c/d", 0.7), ("e/f", 0.3)]
    assert recipe.stages["sft"].data.test == 0.1 and recipe.stages["sft"].train["packing"] is True
    assert left.keys() == {"command", "datasets[1].columns", "hub_token"}
    recipe, left = imported(
        tmp_path, capsys, ("c.yaml", config), ("run.txt", "trl sft --config configs/c.yaml --max_length 200")
    )
    assert recipe.stages["sft"].train["max_length"] == 200 and "command" not in left


GRPO = """\
model_name_or_path: Qwen/Qwen3-0.6B
dtype: bfloat16
use_peft: true
load_in_4bit: true
lora_r: 32
dataset_name: someone/problems
output_dir: outputs/maths-grpo
reward_model_name_or_path: outputs/judge
reward_funcs: [accuracy_reward, my_lib.rewards.short, think_format_reward, get_soft_overlong_punishment]
reward_weights: [0.5, 1.0, 0.25, 1.0, 1.0]
learning_rate: 1.0e-5
max_steps: 300
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
num_generations: 16
max_completion_length: 1024
max_prompt_length: 512
beta: 0.001
epsilon: 0.2
epsilon_high: 0.28
loss_type: dr_grpo
scale_rewards: false
temperature: 0.9
top_p: 0.95
use_vllm: true
vllm_mode: colocate
vllm_importance_sampling_mode: token_mask
log_completions: true
optim: adamw_torch_fused
no_such_word: 1
"""


def test_trl_grpo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A YAML as `trl grpo --config` reads it: TRL's own parser takes it, but for the words that it does not know."""
    from trl import GRPOConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    known = {**yaml.parse(GRPO, "grpo.yaml")[0]}
    del known["no_such_word"], known["max_prompt_length"]
    (tmp_path / "known.yaml").write_text(yaml.dump({**known, "bf16": False, "use_cpu": True}))
    script, config, model = TrlParser((GRPOScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(
        ["--config", str(tmp_path / "known.yaml")]
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_lib").mkdir()
    (tmp_path / "my_lib" / "rewards.py").write_text("def short(completions, **_): ...\n")
    judge = "trl reward --model_name_or_path Qwen/Qwen3-0.6B --dataset_name c/d --use_peft --output_dir outputs/judge"
    judge += " --load_in_4bit --lora_r 32 --dtype bfloat16"
    recipe, left = imported(tmp_path, capsys, ("grpo.yaml", GRPO), ("judge.txt", judge))
    grpo = recipe.stages["grpo"]
    assert recipe.order() == ["reward", "grpo"] and grpo.data.path == script.dataset_name
    assert [(term.source, term.weight) for term in grpo.reward_terms()] == [
        ("reward", 0.5), ("math", 1.0), ("my_lib/rewards.py:short", 0.25)
    ]  # fmt: skip
    assert grpo.train.pop("soft_punish_cache") == 256
    for word, value in grpo.train.items():
        assert value == getattr(config, word), word
    assert grpo.train.keys() >= {"generation_batch_size", "num_generations", "epsilon_high", "loss_type", "beta"}
    assert recipe.spec.model.lora["r"] == model.lora_r
    assert left.keys() == {
        "command", "reward_funcs", "top_p", "use_vllm", "vllm_mode", "vllm_importance_sampling_mode", "log_completions",
        "max_prompt_length", "optim", "no_such_word",
    }  # fmt: skip
    assert "max_steps is" not in left["no_such_word"] and "no word of TRL" in left["no_such_word"]
    assert "does not have" in left["log_completions"]


def test_trl_grpo_without_what_a_stage_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "trl grpo --model_name_or_path a/b --dataset_name c/d --use_peft --num_train_epochs 2 --loss_type cispo"
    text += " --generation_batch_size 64 --reward_weights 1"
    tree, left = imported(tmp_path, capsys, ("run.txt", text), builds=False)
    told = {"reward_funcs", "max_steps", "num_train_epochs", "loss_type", "generation_batch_size", "reward_weights"}
    assert left.keys() == told
    assert tree["stages"]["grpo"]["train"] == {
        "max_completion_length": 512, "per_device_train_batch_size": 8, "generation_batch_size": 64
    }  # fmt: skip


def test_a_trainer_that_has_no_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.txt").write_text("trl gkd --model_name_or_path a/b", encoding="utf-8")
    with pytest.raises(UserError, match="trl gkd: OneBase has no stage"):
        bring([tmp_path / "run.txt"], None)


def test_a_secret_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text(json.dumps({**AXOLOTL, "datasets": [{"path": "a"}], "my_api_key": "s3cr3t"}))
    bring([tmp_path / "a.yml"], None)
    printed = capsys.readouterr()
    assert "my_api_key" in printed.err and "s3cr3t" not in printed.err + printed.out


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yml", "base_model: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("a.yml", "base_model: &a x\ndatasets: *a\n", "anchors and aliases"),
        ("a.yml", "- base_model\n", "expected a file with a mapping of words"),
        ("a.yml", "learning_rate: 1\n", "is not a config of"),
        ("a.txt", "trl sft --model 'x", "is not a command line"),
        ("a.txt", "rm -rf somewhere", "starts no trainer"),
        ("dataset_info.json", "{", "is broken JSON"),
        ("dataset_info.json", "{}", "only describes data sets"),
    ],
)
def test_what_is_no_config_is_refused(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        bring([tmp_path / name], None)


@pytest.mark.parametrize("seed", range(40))
def test_hostile_values_of_known_words_end_in_a_message(seed: int, tmp_path: Path) -> None:
    """Whatever stands behind a word, there is a recipe or a UserError, and nothing else."""
    pick = random.Random(seed)
    odd: list[Any] = [
        [],
        {},
        [1, "a"],
        {"a": [1]},
        -1,
        1e400,
        "x\ny: z",
        "../../etc",
        True,
        "1e-4",
        [[]],
        [{"path": 3}],
    ]
    odd += [{"type": {}}, "--", "\u2028", 2**70]
    peers = {
        "base_model": [*AXOLOTL, *axolotl.REASONS, *axolotl.RENAMED, "datasets", "test_datasets", "rl", "val_set_size"],
        "stage": [*LF, *llama_factory.REASONS, "dataset", "interleave_probs", "lora_target", "reward_model", "seed"],
        "model_name_or_path": [*trl.REASONS, "datasets", "dataset_name", "dtype", "lora_target_modules", "output_dir",
            "reward_funcs", "reward_weights", "scale_rewards", "loss_type", "steps_per_generation"],
    }  # fmt: skip
    first = pick.choice(list(peers))
    words = [*peers[first], *SHARED_REASONS, "learning_rate", "warmup_ratio"]
    config = {first: pick.choice(["sft", "ppo", "a/b"]), **{word: pick.choice(odd) for word in pick.sample(words, 14)}}
    (tmp_path / "a.yaml").write_text(json.dumps(config), encoding="utf-8")
    try:
        bring([tmp_path / "a.yaml"], tmp_path / "recipe.yaml")
    except UserError:
        return
    assert set(yaml.load(tmp_path / "recipe.yaml")[0]) <= {"name", "seed", "model", "stages"}


OF_OTHERS = {
    "axolotl": [
        {**AXOLOTL, "rl": rl, "datasets": [{"path": "a.jsonl"}]} for rl in (None, "dpo")
    ],
    "LLaMA-Factory": [{**LF, "stage": stage, "dataset": "a"} for stage in ("sft", "pt", "dpo", "rm", "ppo")],
    "TRL": [
        {"model_name_or_path": "a/b", "dataset_name": "c/d", **more}
        for more in ({}, {"beta": 1}, {"reward_funcs": ["a.b"]})
    ],
}  # fmt: skip


@pytest.mark.parametrize("peer", OF_OTHERS)
def test_no_word_is_dropped_silently(peer: str) -> None:
    """A word whose value makes no sense anywhere shows in the recipe or is told."""
    take = {
        "axolotl": axolotl.take,
        "LLaMA-Factory": lambda words: llama_factory.take(words, {}, ""),
        "TRL": lambda words: trl.take(words, "", []),
    }[peer]
    listed = {*AXOLOTL, *axolotl.REASONS, *axolotl.RENAMED, *LF, *llama_factory.REASONS, *trl.REASONS, *trl.RENAMED}
    listed |= {*SHARED_REASONS, *DTYPES, *WHY_NOT, *trainer_words("SFTConfig"), *trainer_words("DPOConfig")}
    listed |= {*trainer_words("GRPOConfig"), "reward_funcs", "reward_model_name_or_path"}
    listed |= {"rl_beta", "batch_size", "pref_beta", "pref_loss", "max_new_tokens", "ppo_epochs", "eval_dataset"}
    listed |= {
        "lora_target_modules",
        "lora_target",
        "packing",
        "sample_packing",
        "train_on_inputs",
        "reward_model",
        "seed",
    }
    listed |= {"dataset_config", "dataset_test_split", "test_split_size", "val_size", "val_set_size", "anything"}
    for given in OF_OTHERS[peer]:
        plain = take(Words(given))
        for word in listed - given.keys():
            odd = take(Words({**given, word: "zzz"}))
            seen = replace(odd, left=[]) != replace(plain, left=[])
            assert seen or any(left.word == word for left in odd.left), (peer, word)


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(json.dumps(AXOLOTL), encoding="utf-8")
    with pytest.raises(UserError, match="is there already"):
        bring([tmp_path / "a.yml"], tmp_path / "a.yml")


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(json.dumps({**AXOLOTL, "datasets": [{"path": "a.jsonl"}], "strict": False}))
    printed = onebase(ROOT, tmp_path, "import", "a.yml")
    assert "# From a.yml" in printed and "1 word has no counterpart" in printed
    assert "is written" in onebase(ROOT, tmp_path, "import", "a.yml", "-o", "mine.yaml")
    assert read(tmp_path / "mine.yaml").order() == ["sft"]
