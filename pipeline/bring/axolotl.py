"""An axolotl config as a stage of a recipe."""

from __future__ import annotations

from pipeline.bring import axolotl_rows
from pipeline.bring.axolotl_rows import LOSS, PEER
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

RENAMED = {
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "lr_scheduler": "lr_scheduler_type",
    "dpo_beta": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_use_weighting": "use_weighting",
}
ATTENTION = {"flash_attention": "flash_attention_2", "eager_attention": "eager", "sdp_attention": "sdpa"}
DEFAULTS = {"num_train_epochs": 1.0, "optim": "adamw_torch_fused", "lr_scheduler_type": "cosine"}
"""Where its trainer takes other values than TRL's does."""
OWN_OPTIMIZERS = (
    "muon",
    "came_pytorch",
    "dion",
    "adopt_adamw",
    "optimi_adamw",
    "ao_adamw_4bit",
    "ao_adamw_8bit",
    "ao_adamw_fp8",
)
CACHED = "is not needed: rows are read anew and kept on disk"
TOLD = "is told by the base's own config"
KERNELS = "is another library's kernel"
TOKENS = "is the base's own here: a frozen base keeps its tokens"
TRACKED = {
    "trackio": ("use_trackio", "trackio_project_name", "trackio_run_name"),
    "wandb": ("use_wandb", "wandb_project", "wandb_name"),
    "tensorboard": ("use_tensorboard", "", ""),
    "mlflow": ("use_mlflow", "mlflow_experiment_name", "mlflow_run_name"),
}
"""By tracker: the words that ask for it, name its project, and name the run. To name a project is to ask."""
SHELL = "is the tracker's own setting: set it as a variable of the shell"
HELD_OUT = "is not needed: held-out numbers are taken before and after every stage"
REASONS = {
    **dict.fromkeys(("model_type", "tokenizer_type", "base_model_config", "tokenizer_config"), TOLD),
    **dict.fromkeys(("is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"), TOLD),
    "processor_type": "is for other things than text",
    **dict.fromkeys(
        ("dataset_prepared_path", "dataset_processes", "shuffle_merged_datasets", "dataset_keep_in_memory"), CACHED
    ),
    **dict.fromkeys(
        ("wandb_entity", "wandb_mode", "mlflow_tracking_uri"), SHELL,
    ),
    **dict.fromkeys(("evals_per_epoch", "eval_table_size", "eval_sample_packing", "early_stopping_patience"), HELD_OUT),
    **dict.fromkeys(("special_tokens", "tokens", "added_tokens_overrides", "eot_tokens"), TOKENS),
    **dict.fromkeys(("plugins", "liger_rope", "liger_rms_norm", "liger_glu_activation", "unsloth_lora_mlp",
                     "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "flash_attn_cross_entropy"), KERNELS),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_lr_embedding"), "has no counterpart: an adapter has one rate"),
    **dict.fromkeys(("pad_to_sequence_len", "sample_packing_group_size", "sample_packing_bin_size"), "is decided here"),
    **dict.fromkeys(("wandb_watch", "wandb_log_model"), "is not offered: trackers get no weights and no gradients"),
    "wandb_run_id": "is chosen here: a stage that was stopped goes on in the run that it began",
    "saves_per_epoch": "is counted in steps here: train.save_steps",
    "rl_beta": "is another stage's",
    "strict": "is how a recipe is read anyway",
    "debug": "is onebase data --show here",
    "lora_modules_to_save": "is not offered: a stage trains the adapter alone",
    "lora_fan_in_fan_out": "is told by the base's own layers",
    "peft_init_lora_weights": "is left as PEFT has it, which changes no logit at the start",
    "default_system_message": "is the rows' to say: put it into each as `system`",
    "dataset_exact_deduplication": "is not done unasked: onebase data names duplicates",
    "remove_unused_columns": "is not needed: further columns are carried along",
    "orpo_alpha": "is ORPO's, which has no stage here",
    "simpo_gamma": "is SimPO's, which has no stage here",
    "max_prompt_len": "is not told apart: max_length is of prompt and answer",
    "kto_desirable_weight": "is KTO's, and this is no kto stage",
    "kto_undesirable_weight": "is KTO's, and this is no kto stage",
}  # fmt: skip


def speaks(given: Json) -> bool:
    return "base_model" in given


def take(words: Words) -> Imported:
    labelled = words.given.get("rl") == "kto"
    kind = _kind(words)
    model, train = _model(words), dict(DEFAULTS)
    train["max_length"] = words.whole("sequence_len", 512)
    take_shared(words, model, train)
    for word, ours in RENAMED.items():
        if (value := words.take(word)) is not None:
            train[ours] = plain_number(value)
    if train["optim"] in OWN_OPTIMIZERS:
        words.leave("optimizer", "is another library's: adamw_torch_fused is taken", train["optim"])
        train["optim"] = DEFAULTS["optim"]
    if kind == "kto":
        for word in ("desirable_weight", "undesirable_weight"):
            if (weight := words.number(f"kto_{word}")) is not None:
                train[word] = weight
    if kind in ("dpo", "ipo", "kto") and (beta := words.number("rl_beta")) is not None:
        train["beta"] = beta
    _batch(words, train)
    checkpoints = words.take("gradient_checkpointing")
    if isinstance(checkpoints, str):
        words.leave("gradient_checkpointing", "is true here: activations are computed again, not moved", checkpoints)
    train["gradient_checkpointing"] = bool(checkpoints)
    packed = words.flag("sample_packing")
    if kind in ("sft", "pretrain"):
        train["packing"] = packed
    elif packed:
        words.leave("sample_packing", f"is not for {kind}", packed)
    if words.flag("train_on_inputs"):
        words.leave("train_on_inputs", LOSS, True)
    data, documents = axolotl_rows.take(words, labelled)
    if documents and kind == "sft":
        kind = "pretrain"
    if kind == "ipo":
        kind, train["loss_type"] = "dpo", ["ipo"]
    imported = Imported(kind, model, data, train, words.left)
    imported.output, imported.seed = words.text("output_dir", "model-out"), words.whole("seed")
    imported.goes_on_from = words.text("lora_model_dir")
    _trackers(words, train)
    words.leave_all(REASONS)
    take_trainer_words(words, kind, train)
    words.leave_rest(PEER)
    return imported


def _trackers(words: Words, train: Json) -> None:
    wanted = []
    for tracker, (use, *theirs) in TRACKED.items():
        named = [(ours, word, words.text(word)) for ours, word in zip(("project", "run_name"), theirs, strict=True)]
        used = words.flag(use, bool(named[0][2]))
        if not used or (tracker == "wandb" and words.given.get("wandb_mode") == "disabled"):
            continue
        wanted.append(tracker)
        for ours, word, name in named:
            if name and train.setdefault(ours, name) != name:
                words.leave(word, f"is beside the {ours} of another tracker, and all have one here", name)
    if wanted:
        train["report_to"] = wanted if len(wanted) > 1 else wanted[0]


def _kind(words: Words) -> str:
    rl = words.text("rl")
    if words.flag("reward_model"):
        return "reward"
    if rl not in ("", "dpo", "ipo", "kto"):
        words.leave("rl", "has no stage here: sft is taken", rl)
        return "sft"
    return {"": "sft"}.get(rl, rl)


def _model(words: Words) -> Json:
    if (adapter := words.text("adapter", "none")) not in ("lora", "qlora"):
        only_lora(words, "adapter", adapter)
    targets = words.take("lora_target_modules")
    linear = words.flag("lora_target_linear")
    if targets and linear:
        words.leave("lora_target_modules", "is beside lora_target_linear, which is all of them", targets)
    lora: Json = {
        "r": words.whole("lora_r", 8),
        "lora_alpha": words.number("lora_alpha", 16),
        "lora_dropout": words.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if linear or not targets else targets,
    }
    for word, ours in (("peft_use_dora", "use_dora"), ("peft_use_rslora", "use_rslora")):
        lora |= {ours: True} if words.flag(word) else {}
    bits = 8 if words.flag("load_in_8bit") else 4 if words.flag("load_in_4bit") else None
    data_type = "nf4"
    for settings in words.sections("bnb_config_kwargs"):
        data_type = settings.text("bnb_4bit_quant_type", "nf4")
        settings.leave_rest(PEER)
    model: Json = {"base": base_of(words, "base_model"), "quantize": quantized(words, bits, data_type, "load_in_8bit")}
    for word in ("revision_of_model", "model_revision"):
        if revision := words.text(word):
            model["revision"] = revision
    for word, asked in ATTENTION.items():
        if words.flag(word):
            model |= attention(words, word, asked)
    for word in ("xformers_attention", "flex_attention", "s2_attention"):
        if words.flag(word):
            words.leave(word, "is not known here: sdpa is taken", True)
    _template(words, model)
    return {**model, "lora": lora}


def _template(words: Words, model: Json) -> None:
    template, jinja = words.text("chat_template", "tokenizer_default"), words.text("chat_template_jinja")
    if jinja.endswith((".jinja", ".jinja2")):
        model["chat_template"] = jinja
    elif jinja:
        words.leave(
            "chat_template_jinja", "is written out: put it into a file, and name that as model.chat_template", jinja
        )
    if template not in ("tokenizer_default", "jinja"):
        why = "is the model's own here; model.chat_template names a Jinja file in place of it"
        words.leave("chat_template", why, template)


def _batch(words: Words, train: Json) -> None:
    rows, steps = words.whole("micro_batch_size"), words.whole("gradient_accumulation_steps")
    total = words.whole("batch_size")
    if total and rows and not steps:
        steps = max(1, total // rows)
    elif total and steps and not rows:
        rows = max(1, total // steps)
    elif total:
        words.leave("batch_size", "is beside the rows of a pass and the passes of a step, which say it", total)
    train |= {"per_device_train_batch_size": rows or 1, "gradient_accumulation_steps": steps or 1}
