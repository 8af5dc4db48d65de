"""Which words `train:` and `model.lora` take: those of a library's config class, read from its source, less some.

TRL's and PEFT's names pass through a recipe word for word. Importing them to learn the names takes seconds; reading the
class bodies takes milliseconds, so that a typo is named before torch is imported.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from pipeline.ppo.settings import PPOSettings

_PLACES: dict[str, list[tuple[str, str, str]]] = {
    # config class: (package, file, class) of itself and of what it inherits from
    name: [
        ("trl", f"trainer/{file}.py", name),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ]
    for name, file in {"SFTConfig": "sft_config", "RewardConfig": "reward_config", "DPOConfig": "dpo_config"}.items()
} | {
    "LoraConfig": [
        ("peft", "tuners/lora/config.py", "LoraConfig"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "config.py", "PeftConfigMixin"),
    ]
}

RUNTIME_WORDS = frozenset(
    # Words that change what is seen or how fast it goes, not what is learnt.
    [
        "logging_steps",
        "logging_first_step",
        "logging_dir",
        "save_steps",
        "save_total_limit",
        "report_to",
        "disable_tqdm",
        "run_name",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataset_num_proc",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_strategy",
        "hub_revision",
        "project",
        "trackio_space_id",
        "log_level",
        "use_cpu",
        "kl_stop",
    ]
)
OUR_WORDS = {
    # Words of the trainers that something else here decides; passed on they would be ignored or would do harm.
    "is set by the runner; for the seed use the recipe's own `seed:`": [
        "output_dir",
        "seed",
        "data_seed",
        "resume_from_checkpoint",
        "save_strategy",
        "save_only_model",
    ],
    "is not needed: held-out numbers are taken before and after every stage (data.test, questions)": [
        "eval_strategy",
        "eval_steps",
        "do_eval",
        "load_best_model_at_end",
        "metric_for_best_model",
    ],
    "is decided by the encoder: loss on the assistant's tokens and its end-of-turn token, rows cut at the end": [
        "assistant_only_loss",
        "completion_only_loss",
        "dataset_text_field",
        "dataset_kwargs",
        "truncation_mode",
    ],
    "belongs in the `model:` section": [
        "model_init_kwargs",
        "chat_template_path",
        "eos_token",
        "pad_token",
        "trust_remote_code",
    ],
    "is set by the stage": ["task_type", "inference_mode", "base_model_name_or_path", "peft_type", "modules_to_save"],
    "is not supported, each GPU holds the whole base; for several: --launch-config recipes/accelerate/ddp.yaml": [
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "parallelism_config",
    ],
    "does not belong in a recipe; log in with `hf auth login` or set HF_TOKEN": ["hub_token", "push_to_hub_token"],
}
NUMBERS: dict[str, tuple[type, float]] = {
    # Words whose slips the libraries find late or never, with the least that makes sense.
    "learning_rate": (float, 0),
    "num_train_epochs": (float, 0),
    "max_steps": (int, -1),
    "per_device_train_batch_size": (int, 1),
    "gradient_accumulation_steps": (int, 1),
    "max_length": (int, 1),
    "weight_decay": (float, 0),
    "max_grad_norm": (float, 0),
    "warmup_steps": (float, 0),
    "logging_steps": (float, 0),
    "save_steps": (float, 0),
    "save_total_limit": (int, 1),
    "beta": (float, 0),
    "r": (int, 1),
    "lora_alpha": (float, 0),
    "lora_dropout": (float, 0),
}
AUTO = "auto"
AUTO_WORDS = ("per_device_train_batch_size", "activation_checkpointing", "max_length")
"""Words whose value may be left to the planner (pipeline/plan/auto.py)."""
WHY_NOT = {word: why for why, listed in OUR_WORDS.items() for word in listed}


@cache
def words(config_class: str) -> frozenset[str]:
    """The field names of PPOSettings, or of a config class of the installed library, its parents' included."""
    if config_class == PPOSettings.__name__:
        return frozenset(PPOSettings.model_fields)
    return frozenset(name for name, _ in _fields(config_class))


@cache
def defaults(config_class: str) -> dict[str, Any]:
    """What a config class takes for the words that are not given, where its source says so as plain data."""
    if config_class == PPOSettings.__name__:
        return {name: field.get_default() for name, field in PPOSettings.model_fields.items()}
    found: dict[str, Any] = {}
    for name, value in _fields(config_class):
        if name in found or value is None:
            continue
        given = next((k.value for k in value.keywords if k.arg == "default"), None) if _is_field(value) else value
        with contextlib.suppress(ValueError):
            found[name] = None if given is None else ast.literal_eval(given)
    return found


def _is_field(value: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"


@cache
def _fields(config_class: str) -> list[tuple[str, ast.expr | None]]:
    """The fields of a class and of its parents, the nearest first, each with what it is set to."""
    found: list[tuple[str, ast.expr | None]] = []
    for package, file, class_name in _PLACES[config_class]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed. Install the project: pip install -e .")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        found += [
            (node.target.id, node.value)
            for node in body
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        ]
    return found


def defines(file: Path, name: str) -> bool:
    """Whether a Python file gives a name at its top level, found without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return False
    given = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    given |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    given |= {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return name in given
