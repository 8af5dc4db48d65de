"""Which words a library's config class takes, read from the library's source.

TRL's and PEFT's names pass through a recipe word for word. Importing them to learn the names takes seconds; reading the
class bodies takes milliseconds, so that a typo is named before torch is imported.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

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


@cache
def words(config_class: str) -> frozenset[str]:
    """The field names of PPOSettings, or of a config class of the installed library, its parents' included."""
    if config_class == PPOSettings.__name__:
        return frozenset(PPOSettings.model_fields)
    found: set[str] = set()
    for package, file, class_name in _PLACES[config_class]:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"{package} is not installed. Install the project: pip install -e .")
        tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
        found |= {
            node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
    return frozenset(found)
