"""Build every stage's trainer arguments without a model, so that a refused value is found before any is loaded; and see
whether the base can do what the stages ask of it."""

from __future__ import annotations

import ast
import importlib.util
import logging
import tempfile
import warnings
from functools import cache
from pathlib import Path

from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.plan.shapes import read_config
from pipeline.stages.arguments import without_auto
from pipeline.stages.stage import Context, Rows, StageSpec
from pipeline.training import trackers

SEQUENCE_CLASSIFIERS = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"


def check_trackers(stages: dict[str, StageSpec]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name, spec in stages.items():
        for tracker in trackers.chosen(spec.train.get("report_to")):
            if not trackers.installed(tracker):
                raise UserError(
                    f"stages.{name}.train.report_to: {tracker} is not installed. Install it (pip install {tracker}), "
                    "or leave it out"
                )


def check_base(model: ModelSpec, stages: dict[str, StageSpec]) -> None:
    """Raises UserError for a reward stage on a base that transformers cannot put a score head on. Reads no weights."""
    from pipeline.stages import STAGES

    headed = [name for name, spec in stages.items() if STAGES[spec.kind].score_head]
    if not headed or model.base.endswith(".gguf"):  # what architecture that is, only its weights' file tells
        return
    kind = read_config(model)[0].get("model_type")
    if kind not in _with_a_score_head():
        raise UserError(
            f"stages.{headed[0]}: a base of the type '{kind}' ({model.base}) has no reward model, as transformers has "
            "no sequence-classification head for it. Leave the stage out: dpo learns from the same comparisons, and "
            "ppo can be paid by a function (path.py:function)"
        )


@cache
def _with_a_score_head() -> frozenset[str]:
    """The model types of which transformers has a sequence classifier, read from its source: importing it to look them
    up would load torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed. Install the project: pip install -e .")
    file = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    table = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == SEQUENCE_CLASSIFIERS
    )
    return frozenset(kind for kind, _ in ast.literal_eval(table.args[0]))  # type: ignore[attr-defined]


def check_arguments(model: ModelSpec, stages: dict[str, StageSpec], seed: int) -> None:
    """Raises UserError naming the stage whose arguments its trainer's config refuses, or a LoRA PEFT refuses."""
    # Libraries remark on TRL's own defaults and on optional kernels; neither is the recipe's doing.
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import trl
    from peft import LoraConfig

    from pipeline.stages import STAGES
    from pipeline.training.trainer import arguments

    try:
        LoraConfig(**model.lora)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.lora: PEFT refuses it: {error}") from error
    with tempfile.TemporaryDirectory() as scratch:
        for name, spec in stages.items():
            config = STAGES[spec.kind].config_class
            if isinstance(config, type):
                continue  # ours, checked with the recipe
            spec = spec.model_copy(update={"train": without_auto(spec.train)})
            context = Context(model, Rows([]), {}, Artifact(Path(scratch) / name), seed, "", lambda: None)
            arguments(getattr(trl, config), spec, context)
