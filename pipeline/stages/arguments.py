"""Which words `train:` and `model.lora` take: those of a library's config class, read from its source, less some.

TRL's and PEFT's names pass through a recipe word for word. Importing them to learn the names takes seconds; reading the
class bodies takes milliseconds, so that a typo is named before torch is imported.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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
WHY_NOT = {word: why for why, listed in OUR_WORDS.items() for word in listed}


@cache
def words(config_class: str) -> frozenset[str]:
    """The field names of PPOSettings, or of a config class of the installed library, its parents' included."""
    if config_class == PPOSettings.__name__:
        return frozenset(PPOSettings.model_fields)
    return frozenset(name for body in _bodies(config_class) for name, _ in _fields(body))


def default(config_class: str, word: str) -> Any:
    """What a config class takes a word to be where a recipe says nothing; None where that is not written plainly."""
    if config_class == PPOSettings.__name__:
        return PPOSettings.model_fields[word].default
    for body in _bodies(config_class):
        for name, value in _fields(body):
            if name == word:
                words = value.keywords if isinstance(value, ast.Call) else []
                given = next((key.value for key in words if key.arg == "default"), value)
                return given.value if isinstance(given, ast.Constant) else None
    return None


def _bodies(config_class: str) -> Iterator[list[ast.stmt]]:
    """The bodies of a config class and of what it inherits from."""
    for package, file, class_name in _PLACES[config_class]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed. Install the project: pip install -e .")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        yield next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)


def _fields(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr | None]]:
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node.value


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
