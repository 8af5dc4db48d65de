"""A LLaMA-Factory config as a stage of a recipe. Its data sets are described in dataset_info.json."""

from __future__ import annotations

import os

from pipeline.bring import columns
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
from pipeline.data.dialogues import SPEAKERS
from pipeline.disk.atomic import Json

PEER = "LLaMA-Factory"
KINDS = {"pt": "pretrain", "sft": "sft", "rm": "reward", "dpo": "dpo", "ppo": "ppo", "kto": "kto"}
DEFAULTS = {"learning_rate": 5e-5, "num_train_epochs": 3.0, "lr_scheduler_type": "linear"}
"""Where its trainer takes other values than TRL's does."""
CACHED = "is not needed: rows are read anew and kept on disk"
LOSS = "is decided here: all that the assistant says carries loss"
OTHER = "is another stage's"
OPTIMIZERS = "is another way to train than LoRA by a plain optimizer"
REASONS = {
    **dict.fromkeys(("preprocessing_num_workers", "preprocessing_batch_size", "tokenized_path", "streaming"), CACHED),
    **dict.fromkeys(
        ("plot_loss", "compute_accuracy", "include_effective_tokens_per_second"), "onebase report shows it"
    ),
    **dict.fromkeys(("train_on_prompt", "mask_history", "ignore_pad_token_for_loss"), LOSS),
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_dft_loss"), OPTIMIZERS),
    **dict.fromkeys(
        ("use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_v1_kernels"), "is another library's kernel"
    ),
    **dict.fromkeys(("pissa_init", "pissa_iter", "pissa_convert"), "alters the base, which is frozen here"),
    **dict.fromkeys(
        ("loraplus_lr_ratio", "loraplus_lr_embedding"), "has no counterpart: one rate for all of an adapter"
    ),
    **dict.fromkeys(
        ("resize_vocab", "add_tokens", "add_special_tokens"), "would grow embeddings, which are frozen here"
    ),
    **dict.fromkeys(
        ("ref_model", "ref_model_adapters"), "is not named here: the reference is what the stage goes on from"
    ),
    **dict.fromkeys(("top_k", "top_p"), "is not offered: answers are drawn from the whole distribution"),
    **dict.fromkeys(("pref_beta", "pref_loss", "dpo_label_smoothing", "reward_model", "reward_model_adapters"), OTHER),
    **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), OTHER),
    **dict.fromkeys(("ppo_epochs", "ppo_buffer_size", "ppo_target", "max_new_tokens"), OTHER),
    "ppo_score_norm": "is normalize_reward here",
    "ppo_whiten_rewards": "is not offered: advantages are whitened",
    "template": "is the model's own here; model.chat_template names a Jinja file in place of it",
    "additional_target": "is not offered: a stage trains the adapter alone",
    "eval_on_each_dataset": "is not offered: a stage has one held-out set",
    "media_dir": "is for pictures, and only text is trained on here",
    "ray_run_name": "is Ray's, which is not used",
    "pref_ftx": "is not taken over; loss_type: [sigmoid, sft] with loss_weights does the like",
    "simpo_gamma": "is SimPO's, which has no stage here",
    "reward_model_type": "is told by the stage that `reward` names",
    "use_reentrant_gc": "is decided here: activations are computed again without reentrance",
    "upcast_layernorm": "is decided here: norms stay as the base has them, adapters are float32",
    "low_cpu_mem_usage": "is how bases are loaded anyway",
    "use_fast_tokenizer": "is how tokenizers are loaded anyway",
}

DATA_REASONS = {
    "subset": "is one of several parts of a data set on the Hub: download it and name the files",
    "folder": "is a folder of a data set on the Hub: download it and name the files",
    "revision": "is not named here: a run keeps to the commit that it first reads",
    "ms_hub_url": "is on another hub: download it and name the file",
    "script_url": "is a script, and none is run: convert the rows first",
}


def speaks(given: Json) -> bool:
    """Whether a config is one of LLaMA-Factory's, by words that no other has."""
    return "stage" in given or "finetuning_type" in given or "cutoff_len" in given


def take(words: Words, info: Json | None, folder: str) -> Imported:
    """`info`: dataset_info.json, None where there is none. `folder`: where it lies."""
    stage = words.text("stage", "sft")
    kind = KINDS.get(stage, "sft")
    if stage not in KINDS:
        words.leave("stage", "is no stage here: sft is taken", stage)
    if (method := words.text("finetuning_type", "lora")) != "lora":
        only_lora(words, "finetuning_type", method)
    model, train = _model(words), dict(DEFAULTS)
    train["max_length"] = words.whole("cutoff_len", 2048)
    train["gradient_checkpointing"] = not words.flag("disable_gradient_checkpointing")
    take_shared(words, model, train)
    imported = Imported(kind, model, _data(words, info, folder), train, words.left)
    imported.goes_on_from = ",".join(words.texts("adapter_name_or_path"))
    imported.output, imported.seed = words.text("output_dir"), words.whole("seed")
    packed = words.take("packing"), words.flag("neat_packing")
    if kind in ("sft", "pretrain") and any(packed):
        train["packing"] = True
    elif kind == "pretrain" and packed[0] is False:
        train["packing"] = False
    elif any(packed):
        words.leave("packing", f"is not for {kind}", True)
    if kind == "dpo":
        _dpo(words, train)
    if kind == "kto":
        train["beta"] = words.number("pref_beta", 0.1)
        for word, ours in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
            if (weight := words.number(word)) is not None:
                train[ours] = weight
    if kind == "ppo":
        imported.paid_by = words.text("reward_model") or words.text("reward_model_adapters")
        _ppo(words, train)
    words.leave_all(REASONS)
    take_trainer_words(words, kind, train)
    words.leave_rest(PEER)
    return imported


def _model(words: Words) -> Json:
    rank = words.whole("lora_rank", 8) or 8
    targets = words.texts("lora_target")
    lora: Json = {
        "r": rank,
        "lora_alpha": words.number("lora_alpha") or 2 * rank,
        "lora_dropout": words.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if targets in ([], ["all"]) else targets,
    }
    lora |= {word: True for word in ("use_rslora", "use_dora") if words.flag(word)}
    bits, data_type = words.whole("quantization_bit"), words.text("quantization_type", "nf4")
    if (method := words.text("quantization_method", "bnb")) not in ("bnb", "bitsandbytes"):
        words.leave("quantization_method", "is not offered: bitsandbytes quantises", method)
    if words.take("double_quantization") is False:
        words.leave("double_quantization", "is always done here", False)
    model: Json = {
        "base": base_of(words, "model_name_or_path"),
        "quantize": quantized(words, bits, data_type, "quantization_bit"),
    }
    if (revision := words.text("model_revision", "main")) != "main":
        model["revision"] = revision
    asked = words.text("flash_attn", "auto")
    if asked in ("fa2", "fa3"):
        model |= attention(words, "flash_attn", f"flash_attention_{asked[-1]}")
    elif asked not in ("auto", "sdpa"):
        words.leave("flash_attn", "is not known here: sdpa is taken", asked)
    return {**model, "lora": lora}


def _dpo(words: Words, train: Json) -> None:
    if (beta := words.number("pref_beta")) is not None:
        train["beta"] = beta
    loss = words.text("pref_loss", "sigmoid")
    if loss in ("hinge", "ipo"):
        train["loss_type"] = [loss]
    elif loss != "sigmoid":
        words.leave("pref_loss", "has no stage here: DPO's own loss is taken", loss)
    if smoothing := words.number("dpo_label_smoothing"):
        words.leave("dpo_label_smoothing", "has no counterpart: label_smoothing is of the robust loss alone", smoothing)


def _ppo(words: Words, train: Json) -> None:
    """Its steps are counted by epochs, ours by themselves; so they are not taken over."""
    rows = words.whole("per_device_train_batch_size", 8) or 8
    batch = rows * (words.whole("gradient_accumulation_steps", 1) or 1)
    train |= {"per_device_train_batch_size": rows, "mini_batch_size": batch}
    train["batch_size"] = batch * (words.whole("ppo_buffer_size", 1) or 1)
    train["num_ppo_epochs"] = words.whole("ppo_epochs", 4)
    train["kl_target"] = words.number("ppo_target", 6.0)
    answer = words.whole("max_new_tokens", 1024) or 1024
    train |= {"response_length": answer, "max_length": train["max_length"] + answer}
    for word in ("num_train_epochs", "max_steps"):
        train.pop(word, None)
        if word in words.rest:
            words.leave(word, "is counted in rollouts here: give ppo its steps")


def _data(words: Words, info: Json | None, folder: str) -> Json:
    names, limit = words.texts("dataset"), words.whole("max_samples")
    said = words.text("dataset_dir")
    if said and info is None:
        folder = said
    parts = [_part(words, name, info, folder, limit) for name in names]
    if not parts:
        words.leave("dataset", "is missing: name the rows as data.path", None)
        parts = [{"path": "DATA"}]
    held_out = [_part(words, name, info, folder, None) for name in words.texts("eval_dataset")]
    shares, strategy = words.texts("interleave_probs"), words.text("mix_strategy", "concat")
    weights = [plain_number(share) for share in shares]
    if len(weights) == len(parts) > 1:
        parts = [{**part, "weight": weight} for part, weight in zip(parts, weights, strict=True)]
    elif shares:
        words.leave("interleave_probs", "is not one number for each data set", shares)
    if strategy == "interleave_over":
        words.leave("mix_strategy", "is not done unasked: raise a source's epochs to pass over it again", strategy)
    data: Json = dict(parts[0]) if len(parts) == 1 else {"mix": parts}
    if share := words.number("val_size"):
        data["test"] = share
    if held_out:
        data["test"] = held_out[0]["path"]
        for part in held_out[1:]:
            words.leave("eval_dataset", "is a second held-out file; a stage has one", part["path"])
    return data


def _part(words: Words, name: str, info: Json | None, folder: str, limit: int | None) -> Json:
    """A data set by its name, as an entry of a recipe's data."""
    part: Json = {"path": name} | ({"limit": limit} if limit else {})
    described = info.get(name) if info else None
    if not isinstance(described, dict):
        why = (
            "is not in dataset_info.json"
            if info
            else "is described in dataset_info.json, which is not here: give it as a FILE too"
        )
        words.leave("dataset", f"{why}; put the path of its file", name)
        return part
    entry = Words(described, f"{name}.", words.left)
    hub, file = entry.text("hf_hub_url"), entry.text("file_name")
    if hub:
        part["path"] = hub
    elif file:
        part["path"] = os.path.join(folder, file) if folder else file
    else:
        entry.leave("file_name", "is missing; put the path of its file", name)
    if (split := entry.text("split", "train")) != "train":
        part["split"] = split
    if samples := entry.whole("num_samples"):
        part["limit"] = min(samples, limit or samples)
    if found := _format(entry):
        part["format"] = found
    if hub and file:
        entry.leave("file_name", "is beside hf_hub_url, which counts", file)
    entry.take("ranking")  # the columns say so
    entry.leave_all(DATA_REASONS)
    entry.leave_rest(PEER)
    return part


def _format(entry: Words) -> str | None:
    formatting = entry.text("formatting", "alpaca")
    (named,), (tags,) = ((entry.sections(word) or [Words({})])[:1] for word in ("columns", "tags"))
    given = {use: column for use in named.given if (column := named.text(use))}
    for use in ("images", "videos", "audios"):
        if use in given:
            entry.leave(
                "columns", "are for other things than text, which alone is trained on here", {use: given.pop(use)}
            )
    if "kto_tag" in given:
        given["label"] = given.pop("kto_tag")
    if formatting in ("sharegpt", "openai"):
        speaker, said = ("from", "value") if formatting == "sharegpt" else ("role", "content")
        role, content = tags.text("role_tag", speaker), tags.text("content_tag", said)
        column = given.get("messages", "conversations" if formatting == "sharegpt" else "messages")
        found = columns.format_of_dialogues(column, role, content)
        if found is None:
            entry.leave(
                "columns", f"calls the turns '{column}', '{role}', '{content}': rename them as sharegpt has them", given
            )
        if found == "sharegpt" and "label" in given:
            found = "kto"
        if renamed := {use: name for use, name in given.items() if use not in ("messages", "label", name)}:
            entry.leave("columns", f"are called otherwise here ({columns.told(renamed)}): rename them", renamed)
        for tag in tags.rest:
            _check_tag(entry, tag, str(tags.rest[tag]))
        return found
    given = given or {"prompt": "instruction", "query": "input", "response": "output"}
    found = columns.format_of(given)
    if found is None:
        entry.leave("columns", f"is in none of our formats ({columns.told(given)}): rename them", given)
    return found


def _check_tag(entry: Words, tag: str, speaker: str) -> None:
    if speaker not in SPEAKERS:
        entry.leave("tags", f"calls {tag} '{speaker}', which is none of {', '.join(SPEAKERS)}", speaker)
