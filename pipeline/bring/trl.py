"""A TRL command line, or the YAML that its `--config` reads, as a stage of a recipe. Nothing of it is run."""

from __future__ import annotations

import re
import shlex
from pathlib import PurePosixPath

from pipeline.bring.words import (
    Imported,
    Words,
    attention,
    base_of,
    only_lora,
    plain_number,
    quantized,
    take_shared,
    take_trainer_words,
)
from pipeline.disk.atomic import Json
from pipeline.errors import UserError
from pipeline.ppo.grpo_settings import GRPOSettings
from pipeline.recipe import yaml
from pipeline.stages import arguments as trainer
from pipeline.stages.arguments import WHY_NOT

PEER = "TRL"
KINDS = {"sft": "sft", "dpo": "dpo", "reward": "reward", "kto": "kto", "grpo": "grpo"}
NOT_HERE = ("rloo", "ppo", "orpo", "cpo", "gkd", "online_dpo", "nash_md", "xpo", "prm", "bco")
RENAMED = {"max_seq_length": "max_length", "num_train_epoch": "num_train_epochs"}
TOLD = "is told by the rows: what the assistant says carries loss"
REASONS = {
    **dict.fromkeys(("dataset_streaming", "streaming"), "is not needed: rows lie on disk, not in memory"),
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length"), "is not told apart: max_length is of both together"
    ),
    "dataset_config": "is one of several parts of a data set on the Hub: download it and name the files",
    "use_bnb_nested_quant": "is always done here",
    "lora_task_type": "is set by the stage",
    "lora_modules_to_save": "is not offered: a stage trains the adapter alone",
    "lora_target_parameters": "is not taken over: model.lora takes it as target_parameters",
    "ignore_bias_buffers": "is not needed here",
    "config": "names another file: give it as a FILE too",
    "env": "sets variables of a process, which a recipe does not",
    "ref_model": "is not named here: the reference is what the stage goes on from",
    "num_processes": "belongs to an accelerate config: --launch-config",
    "accelerate_config": "belongs to an accelerate config: --launch-config",
}
GRPO_REASONS = {
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
        "is not offered: answers are drawn from the very distribution whose log-probabilities are learnt from",
    ),
    "use_vllm": "is not taken over: `rollout: {engine: vllm}` says so here, see docs/rollouts.md",
    "num_train_epochs": "is not counted here: max_steps is",
    "optim": "is not offered: AdamW",
}
GRPO_LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "rloo")
DATA_REASONS = {
    "name": "is one of several parts of a data set on the Hub: download it and name the files",
    "data_dir": "is a folder of a data set: name its files",
    "columns": "is not needed: further columns are carried along",
}


def speaks(given: Json) -> bool:
    return "model_name_or_path" in given


def parse_command(text: str, file: str) -> tuple[str, Json, list[str]]:
    """Of a command line: which trainer it starts, its options, and the words before it.

    Raises UserError if it is none of TRL's."""
    try:
        typed = shlex.split(text.replace("\\\r\n", " ").replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise UserError(f"{file}: is not a command line ({error})") from error
    for at, word in enumerate(typed):
        after = typed[at + 1] if at + 1 < len(typed) else ""
        if PurePosixPath(word).name == "trl" and after and not after.startswith("-"):
            return after, _options(typed[at + 2 :], file), typed[:at]
        if word.endswith(".py"):
            return PurePosixPath(word).stem, _options(typed[at + 1 :], file), typed[:at]
    raise UserError(f"{file}: starts no trainer of TRL's (expected `trl sft --...`, or a script such as dpo.py)")


def _options(typed: list[str], file: str) -> Json:
    """--name value, --name=value, --name value value, or --name alone, which is true."""
    options: Json = {}
    name, values = "", list[str]()
    for word in [*typed, "--"]:
        if not re.match(r"--[A-Za-z]|--$", word):
            values.append(word)
            continue
        if name:
            options[name] = True if not values else _value(values[0], file) if len(values) == 1 else values
        elif values:
            options["arguments"] = " ".join(values)
        name, equals, value = word[2:].partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
    return options


def _value(text: str, file: str) -> str | int | float | bool:
    """A number or true and false as YAML reads them; else the text as it stands."""
    try:
        value = yaml.parse(f"value: {text}", file)[0].get("value")
    except UserError:
        return text
    return value if isinstance(value, int | float) else text


def take(words: Words, kind: str, launcher: list[str]) -> Imported:
    """`kind`: as the command names it, empty where a YAML does not say."""
    if kind in NOT_HERE or (kind and kind not in KINDS):
        raise UserError(
            f"trl {kind}: OneBase has no stage that learns in the same way (there is: sft, reward, dpo, kto, grpo)"
        )
    if launcher:
        words.leave("command", "is the launcher's: --launch-config, or the shell you type in", " ".join(launcher))
    if not kind:
        kind = _guess(words)
        words.leave("command", f"is not in a YAML, and {kind} is guessed: give the command as a FILE too", kind)
    kind = KINDS[kind]
    model: Json = _model(words)
    train: Json = {}
    take_shared(words, model, train)
    for word, ours in RENAMED.items():
        if (value := words.take(word)) is not None:
            train[ours] = plain_number(value)
    imported = Imported(kind, model, _data(words), train, words.left)
    imported.output, imported.seed = words.text("output_dir"), words.whole("seed")
    if kind == "grpo":
        imported.rewards = _grpo(words, train)
    words.leave_all(REASONS)
    take_trainer_words(words, kind, train)
    words.leave_rest(PEER)
    return imported


def _grpo(words: Words, train: Json) -> list[Json]:
    """What it is paid by; its trainer's words go to `train`, with TRL's defaults where ours are others."""
    if (scale := words.take("scale_rewards")) is not None:
        train["scale_rewards"] = {True: "group", False: "none"}.get(scale, scale) if isinstance(scale, bool) else scale
    train["max_completion_length"] = words.whole("max_completion_length", 512)
    train["per_device_train_batch_size"] = words.whole("per_device_train_batch_size", 8)
    accumulated = words.whole("gradient_accumulation_steps", 1) or 1
    turns = words.whole("steps_per_generation") or accumulated
    at_once = words.whole("generation_batch_size") or train["per_device_train_batch_size"] * turns
    train["generation_batch_size"] = at_once
    if at_once != train["per_device_train_batch_size"] * accumulated:
        why = "is more or less than the answers of an optimizer step there: here each rollout makes one step"
        words.leave("generation_batch_size", why, at_once)
    if words.rest.get("max_steps", -1) == -1:
        words.leave("max_steps", "is missing: 100 is taken", words.take("max_steps"))
    if (loss := words.rest.get("loss_type", "dapo")) not in GRPO_LOSSES:
        words.leave(
            "loss_type", f"is no loss of a grpo stage (there is: {', '.join(GRPO_LOSSES)}): dapo is taken", loss
        )
    rewards = _rewards(words, train)
    words.leave_all(GRPO_REASONS)
    words.leave_all({word: GRPO_REASONS["use_vllm"] for word in words.rest if word.startswith("vllm_")})
    theirs = trainer.words("GRPOConfig") - trainer.words(GRPOSettings) - WHY_NOT.keys() - REASONS.keys()
    words.leave_all(dict.fromkeys(theirs, "is a word of TRL that a grpo stage does not have"))
    return rewards


def _rewards(words: Words, train: Json) -> list[Json]:
    """The terms of `reward:`. A reward model is named by its folder, and comes first, as in TRL."""
    model, functions = words.text("reward_model_name_or_path"), words.texts("reward_funcs")
    weights = words.take("reward_weights")
    if not isinstance(weights, list) or len(weights) != len(functions) + bool(model):
        if weights is not None:
            words.leave("reward_weights", "is no list with a weight for each reward: 1 is taken for each", weights)
        weights = [1.0] * (len(functions) + bool(model))
    terms = [{"source": model, "weight": weights[0]}] if model else []
    for name, weight in zip(functions, weights[bool(model) :], strict=True):
        module, _, function = name.rpartition(".")
        if name == "accuracy_reward":
            terms.append({"source": "math", "weight": weight})
        elif name == "get_soft_overlong_punishment":
            train["soft_punish_cache"] = 256
            words.leave(
                "reward_funcs", "is soft_punish_cache here, below max_completion_length and not below 1280", name
            )
        elif module:
            terms.append({"source": f"{module.replace('.', '/')}.py:{function}", "weight": weight})
        else:
            why = "is a function inside TRL: write it into a file, and name that as path.py:function under reward"
            words.leave("reward_funcs", why, name)
    if not terms:
        words.leave("reward_funcs", "is missing: name what the answers are paid by as reward")
    return terms


def _guess(words: Words) -> str:
    if {"reward_funcs", "reward_model_name_or_path", "num_generations"} & words.rest.keys():
        return "grpo"
    if {"desirable_weight", "undesirable_weight"} & words.rest.keys():
        return "kto"
    if {"beta", "loss_type", "precompute_ref_log_probs", "label_smoothing"} & words.rest.keys():
        return "dpo"
    return "reward" if "center_rewards_coefficient" in words.rest else "sft"


def _model(words: Words) -> Json:
    if not words.flag("use_peft"):
        only_lora(words, "use_peft", "false")
    targets = words.texts("lora_target_modules")
    lora: Json = {
        "r": words.whole("lora_r", 16),
        "lora_alpha": words.number("lora_alpha", 32),
        "lora_dropout": words.number("lora_dropout", 0.05),
        "target_modules": "all-linear" if targets in ([], ["all-linear"]) else targets,
    }
    lora |= {word: True for word in ("use_rslora", "use_dora") if words.flag(word)}
    bits = 8 if words.flag("load_in_8bit") else 4 if words.flag("load_in_4bit") else None
    data_type = words.text("bnb_4bit_quant_type", "nf4")
    model: Json = {
        "base": base_of(words, "model_name_or_path"),
        "quantize": quantized(words, bits, data_type, "load_in_8bit"),
    }
    if (revision := words.text("model_revision", "main")) != "main":
        model["revision"] = revision
    if asked := words.text("attn_implementation"):
        model |= attention(words, "attn_implementation", asked)
    for word in ("dtype", "torch_dtype"):
        if (dtype := words.text(word)) in ("bfloat16", "float16", "float32", "auto"):
            model["dtype"] = dtype
        elif dtype:
            words.leave(word, "is no dtype here: auto is taken", dtype)
    return {**model, "lora": lora}


def _data(words: Words) -> Json:
    parts = [_part(source) for source in words.sections("datasets")]
    name, split = words.text("dataset_name"), words.text("dataset_train_split", "train")
    if parts and name:
        words.leave("dataset_name", "is beside datasets, which counts", name)
    elif name:
        parts = [{"path": name} | ({"split": split} if split != "train" else {})]
    if not parts:
        words.leave("dataset_name", "is missing: name the rows as data.path")
        parts = [{"path": "DATA"}]
    data: Json = dict(parts[0]) if len(parts) == 1 else {"mix": parts}
    if share := words.number("test_split_size"):
        data["test"] = share
    if held_out := words.text("dataset_test_split"):
        words.leave(
            "dataset_test_split", "is a split; data.test is a file, or a share to hold out such as 0.05", held_out
        )
    data.pop("weight", None)
    return data


def _part(source: Words) -> Json:
    path, files = source.text("path"), source.texts("data_files")
    if files and path in ("json", "csv", "parquet", "text"):
        path, files = files[0], files[1:]
    if files:
        source.leave("data_files", "names files of a data set: name each as an entry of `mix`", files)
    part: Json = {"path": path or "DATA"}
    if (split := source.text("split", "train")) != "train":
        part["split"] = split
    if share := source.number("fraction"):
        part["weight"] = share
    source.leave_all(DATA_REASONS)
    source.leave_rest(PEER)
    return part
