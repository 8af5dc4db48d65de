"""Build every stage's trainer arguments without a model, so that a refused value is found before any is loaded; and see
whether the base can do what the stages ask of it."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.plan.shapes import read_config
from pipeline.stages.arguments import AUTO
from pipeline.stages.stage import Context, Rows, StageSpec


def check_base(model: ModelSpec, stages: dict[str, StageSpec]) -> None:
    """Raises UserError for a reward stage on a base that transformers cannot put a score head on. Reads no weights."""
    rewards = [name for name, spec in stages.items() if spec.kind == "reward"]
    if not rewards or model.base.endswith(".gguf"):  # what architecture that is, only its weights' file tells
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    kind = read_config(model)[0].get("model_type")
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise UserError(
            f"stages.{rewards[0]}: a base of the type '{kind}' ({model.base}) has no reward model, as transformers has "
            "no sequence-classification head for it. Leave the stage out: dpo learns from the same comparisons, and "
            "ppo can be paid by a function (path.py:function)"
        )


def check_arguments(model: ModelSpec, stages: dict[str, StageSpec], seed: int) -> None:
    """Raises UserError naming the stage whose arguments its trainer's config refuses, or a LoRA PEFT refuses."""
    # Libraries remark on TRL's own defaults and on optional kernels; neither is the recipe's doing.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import trl
    from peft import LoraConfig

    from pipeline.stages import STAGES
    from pipeline.stages.trainer import arguments

    try:
        LoraConfig(**model.lora)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.lora: PEFT refuses it: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        for name, spec in stages.items():
            if not hasattr(trl, STAGES[spec.kind].config_class):
                continue  # PPOSettings, checked with the recipe
            # What auto stands for depends on the card; every other word is checked without it.
            words = {word: value for word, value in spec.train.items() if value != AUTO}
            spec = spec.model_copy(update={"train": words})
            context = Context(model, Rows([]), {}, Artifact(Path(scratch) / name), seed, "", lambda: None)
            arguments(getattr(trl, STAGES[spec.kind].config_class), spec, context)
