"""Build every stage's trainer arguments without a model, so that a refused value is found before any is loaded."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.stages.arguments import AUTO
from pipeline.stages.stage import Context, Rows, StageSpec


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
