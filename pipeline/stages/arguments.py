"""Which words `train:` and `model.lora` take: those of a config class, less some. A library's is read from its source.

TRL's and PEFT's names pass through a recipe word for word. Importing them to learn the names takes seconds; reading the
class bodies takes milliseconds, so that a typo is named before torch is imported.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import BaseModel

from pipeline.errors import complaint, suggest
from pipeline.plan.sizes import AUTO, AUTO_ARGUMENTS, BATCH, TOKENS
from pipeline.training.trackers import TRACKERS

ConfigClass = str | type[BaseModel]
"""A class of TRL's or PEFT's by its name, or one of ours."""
RUNTIME_WORDS = frozenset((  # words that change what is seen or how fast it goes, not what is learnt
    "logging_steps", "logging_first_step", "logging_dir", "save_steps", "save_total_limit", "report_to",
    "disable_tqdm", "run_name", "dataloader_num_workers", "dataloader_pin_memory", "dataset_num_proc", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_strategy", "hub_revision", "project", "trackio_space_id", "log_level",
    "use_cpu", "kl_stop", "tool_timeout",
))  # fmt: skip
OUR_WORDS = {  # the trainers' words that something else here decides; passed on they would be ignored or do harm
    "is set by the runner; for the seed use the recipe's own `seed:`": (
        "output_dir", "seed", "data_seed", "resume_from_checkpoint", "save_strategy", "save_only_model",
    ),
    "is not needed: held-out numbers are taken before and after every stage (data.test, questions)": (
        "eval_strategy", "eval_steps", "do_eval", "load_best_model_at_end", "metric_for_best_model",
    ),
    "is not needed: use_liger_kernel takes Liger's RMSNorm and SwiGLU, and leaves positions and losses as they are": (
        "liger_kernel_config",
    ),
    "is decided by the encoder: loss on the assistant's tokens and its end-of-turn token, rows cut at the end": (
        "assistant_only_loss", "completion_only_loss", "dataset_text_field", "dataset_kwargs", "truncation_mode",
    ),
    "belongs in the `model:` section": (
        "model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "trust_remote_code",
    ),
    "is set by the stage": (
        "task_type", "inference_mode", "base_model_name_or_path", "peft_type", "modules_to_save",
    ),
    "is not supported: each GPU holds the whole base. For several: --launch-config recipes/accelerate/ddp.yaml": (
        "deepspeed", "fsdp", "fsdp_config", "parallelism_config",
    ),
    "is not supported: a recipe names a Space to send to as trackio_space_id": (
        "trackio_bucket_id", "trackio_static_space_id",
    ),
    "does not belong in a recipe; log in with `hf auth login` or set HF_TOKEN": (
        "hub_token", "push_to_hub_token",
    ),
}  # fmt: skip
NUMBERS: dict[str, tuple[type, float]] = {
    # Words whose slips the libraries find late or never, with the least that makes sense.
    "learning_rate": (float, 0), "num_train_epochs": (float, 0), "max_steps": (int, -1),
    BATCH: (int, 1), TOKENS: (int, 1), "gradient_accumulation_steps": (int, 1), "max_length": (int, 1),
    "weight_decay": (float, 0), "max_grad_norm": (float, 0), "warmup_steps": (float, 0), "logging_steps": (float, 0),
    "save_steps": (float, 0), "save_total_limit": (int, 1), "beta": (float, 0), "desirable_weight": (float, 0),
    "undesirable_weight": (float, 0), "r": (int, 1),
    "lora_alpha": (float, 0), "lora_dropout": (float, 0),
}  # fmt: skip
NOT_BY_TOKENS = {  # words that a batch by tokens makes meaningless, each with the values under which it stays so
    "packing": (False, None), "dataloader_drop_last": (False, None), "auto_find_batch_size": (False, None),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
}  # fmt: skip
INSTEAD = {
    "num_train_epochs": "this stage counts steps: max_steps (grpo) or steps (ppo)",
    "gradient_accumulation_steps": "all answers of generation_batch_size (grpo) or batch_size (ppo) make one step",
    "max_prompt_length": "max_length holds prompt and answer together",
    "use_vllm": "write rollout: {engine: vllm} in the stage, beside train:",
    **dict.fromkeys(("top_p", "top_k", "min_p"), "answers are drawn from the whole distribution that is learnt from"),
    **dict.fromkeys(("sft_coef", "pretraining_coef"), "sft and dpo have replay:, beside train:"),
    **{
        word: f"{other}of rejection_sampling it stands in sampling:, beside train:"
        for word, other in (
            ("num_generations", "ppo samples one answer to each prompt; "),
            ("max_completion_length", "ppo calls it response_length; "),
            ("generation_batch_size", "ppo calls it batch_size; "),
            ("threshold", ""),
        )
    },
    "response_length": "it is ppo's; grpo and rejection_sampling (in sampling:) call it max_completion_length",
    "batch_size": "it is ppo's; grpo and rejection_sampling (in sampling:) call it generation_batch_size",
    "kl_coef": "it is ppo's; grpo, dpo and kto call it beta",
    "beta": "ppo calls it kl_coef",
    "kl_target": "it is ppo's; in other stages the weight of the KL penalty is fixed",
    "missing_eos_penalty": "it is ppo's; grpo has soft_punish_cache and mask_truncated_completions",
}
"""What to say in place of words that a stage lacks and others, or TRL, have."""
WHY_NOT = {word: why for why, listed in OUR_WORDS.items() for word in listed}


@cache
def words(config: ConfigClass) -> frozenset[str]:
    """The field names of a config class, its parents' included; of a trainer's of TRL also the one we add."""
    if isinstance(config, type):
        return frozenset(config.model_fields)
    return frozenset(name for name, _ in _fields(config)) | (set() if config == "LoraConfig" else {TOKENS})


@cache
def defaults(config: ConfigClass) -> dict[str, Any]:
    """What a config class takes for the words that are not given, where its source says so as plain data."""
    if isinstance(config, type):
        return {name: field.get_default() for name, field in config.model_fields.items()}
    found: dict[str, Any] = {}
    for name, value in _fields(config):
        if name in found or value is None:
            continue
        given = next((k.value for k in value.keywords if k.arg == "default"), None) if _is_field(value) else value
        with contextlib.suppress(ValueError):
            found[name] = None if given is None else ast.literal_eval(given)
    return found


@cache
def explanations(config: str) -> dict[str, str]:
    """What a library's config class says of its words, where its source says so as plain text."""
    return {word: str(told["help"]) for word, told in _metadata(config).items() if told.get("help")}


@cache
def choices(config: ConfigClass) -> dict[str, list[str]]:
    """The values that a library's words may have, of those words whose values its config class lists: as plain data,
    or quoted in its explanation after "Possible values are"."""
    if isinstance(config, type):
        return {}
    found = {word: told["choices"] for word, told in _metadata(config).items() if "choices" in told}
    for word, text in explanations(config).items():
        listed = re.findall(r"`'(\w+)'`", text.partition("Possible values are")[2].partition(". ")[0])
        if listed:
            found.setdefault(word, listed)
    return found


@cache
def _metadata(config: str) -> dict[str, dict[str, Any]]:
    """What a library's config class notes of its words, as far as its source says so as plain data."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in _fields(config):
        if name in found or value is None or not _is_field(value):
            continue
        noted = next((k.value for k in value.keywords if k.arg == "metadata"), None)
        found[name] = {}
        for key, plain in zip(noted.keys, noted.values, strict=True) if isinstance(noted, ast.Dict) else ():
            if isinstance(key, ast.Constant):
                with contextlib.suppress(ValueError):
                    found[name][str(key.value)] = ast.literal_eval(plain)
    return found


def check_words(given: dict[str, Any], known: Collection[str], *place: str) -> None:
    """Raises a complaint at the first word that is not known here, is not a recipe's to say, or is no number where the
    library would find out late."""
    for word, value in given.items():
        if word in WHY_NOT:
            raise complaint(WHY_NOT[word], *place, word)
        if word not in known:
            meant = f"; {INSTEAD[word]}" if word in INSTEAD else suggest(word, known)
            raise complaint(f"unknown key{meant}", *place, word)
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?", value):
            raise complaint(f"is the text {value!r}; write the number without quotes", *place, word)
        if value == AUTO and word in AUTO_ARGUMENTS:
            continue
        if word in NUMBERS and not _in_range(value, *NUMBERS[word]):
            kind, least = NUMBERS[word]
            wanted = "a whole number" if kind is int else "a number"
            raise complaint(f"is {value!r}, expected {wanted} of at least {least}", *place, word)


def check_train(given: dict[str, Any], config: ConfigClass) -> None:
    """Raises a complaint, or what our own config class says, at the first word of `train:` that makes no sense."""
    check_words(given, words(config))
    for word, listed in choices(config).items():
        values = given.get(word)
        for value in values if isinstance(values, list) else [values]:
            if value not in (None, AUTO, *listed):
                raise complaint(f"is {value!r}; the trainer takes {', '.join(listed)}", word)
    check_report_to(given)
    if given.get(TOKENS):
        _check_by_tokens(given)
    if isinstance(config, type):
        config(**without_auto(given))
    elif given.get(BATCH) == AUTO and not isinstance(given.get("gradient_accumulation_steps"), int):
        raise complaint(
            "is auto; then give gradient_accumulation_steps too: it says how many rows an optimizer step has, for "
            "example 16",
            BATCH,
        )


def check_report_to(given: dict[str, Any], *place: str) -> None:
    """Raises a complaint at a tracker that is not known."""
    report_to = given.get("report_to")
    names = report_to if isinstance(report_to, list) else [report_to]
    for name in names:
        if name not in (*TRACKERS, "all", "none", None):
            raise complaint(f"there is no tracker {name!r}{suggest(name, TRACKERS)}", *place, "report_to")
        if name in ("all", "none") and len(names) > 1:
            raise complaint(f"says {name!r} beside others: give it alone, or leave it out", *place, "report_to")


def _check_by_tokens(given: dict[str, Any]) -> None:
    if BATCH in given:
        raise complaint(f"counts a batch in rows, and {TOKENS} counts it in tokens: leave one of them out", BATCH)
    for word, fitting in NOT_BY_TOKENS.items():
        if given.get(word, fitting[0]) not in fitting:
            problem = f"is {given[word]!r}, which does not go with {TOKENS}: leave one of them out"
            raise complaint(problem, word)


def one_of_both(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says for every stage, without the word for a batch in place of which a stage's own says the
    other."""
    gone = BATCH if own.get(TOKENS) else TOKENS if own.get(BATCH) else None
    return {word: value for word, value in shared.items() if word != gone}


def without_auto(given: dict[str, Any]) -> dict[str, Any]:
    """What `auto` stands for depends on the card; every other word is known without it."""
    return {word: value for word, value in given.items() if value != AUTO}


def _in_range(value: Any, kind: type, least: float) -> bool:
    if value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return bool(value >= least)


def _is_field(value: ast.expr) -> TypeGuard[ast.Call]:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"


def _places(config: str) -> list[tuple[str, str, str]]:
    """(package, file, class) of a library's config class and of what it inherits from."""
    if config == "LoraConfig":
        above = [("peft", "config.py", "PeftConfig"), ("peft", "config.py", "PeftConfigMixin")]
        return [("peft", "tuners/lora/config.py", config), *above]
    own = f"trainer/{config.removesuffix('Config').lower()}_config.py"
    above = [
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ]
    return [("trl", own, config), *above]


@cache
def _fields(config: str) -> list[tuple[str, ast.expr | None]]:
    """The fields of a class and of its parents, the nearest first, each with what it is set to."""
    found: list[tuple[str, ast.expr | None]] = []
    for package, file, class_name in _places(config):
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


def undefined(file: str, name: str) -> str:
    """Why a Python file does not give a name at its top level, found without running it; "" where it does."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"{file}:{error.lineno} cannot be read as Python: {error.msg}"
    except (ValueError, OSError) as error:
        return f"{file} cannot be read as Python: {error}"
    given = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    given |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    given |= {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return "" if name in given else f"{file} defines no '{name}'{suggest(name, sorted(given))}"
