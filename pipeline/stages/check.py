"""Build every stage's trainer arguments without a model, so that a refused value is found before any is loaded; and see
whether the base can do what the stages ask of it, and its chat template render their rows."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec, unpackable
from pipeline.plan.shapes import read_config
from pipeline.ppo.engine_settings import find_python
from pipeline.stages.arguments import without_auto
from pipeline.stages.stage import Context, Rows, StageSpec
from pipeline.training import trackers

SEQUENCE_CLASSIFIERS = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
LANGUAGE_MODELS = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
"""Layers of which transformers keeps rows apart that lie end to end, by their positions."""

NOT_BY_VLLM = ("use_dora", "lora_bias", "bias", "layer_replication")
"""Words of PEFT's whose adapters it refuses (vllm/lora/peft_helper.py, 0.32)."""
RENDERED = 5000
"""Rows of a file that are put through the chat template, which makes a few thousand a second."""


def check_rendering(model: ModelSpec, stages: Mapping[str, StageSpec], rows: Mapping[str, Rows]) -> list[str]:
    """Put rows and questions through the chat template, as a stage does before it trains. Loads no weights. Gives what
    was not tried, and why.

    Raises UserError naming the rows that would stop a run. A base on the Hub that cannot be reached is no fault.
    """
    if model.base.endswith(".gguf"):
        return ["the chat template. It is in the .gguf file, which the first run converts: onebase data tries all rows"]
    from pipeline.models.base import load_tokenizer
    from pipeline.models.quiet import quiet
    from pipeline.stages import STAGES
    from pipeline.training import sequences

    quiet()
    try:
        tokenizer = load_tokenizer(model)
    except UserError as error:
        if os.path.isdir(model.base) or model.chat_template:
            raise
        return [f"the chat template, as {str(error).splitlines()[0]} Check again once the base is here"]
    untried = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, spec in stages.items():
            of, encode = rows[name], STAGES[spec.kind].encode
            asked = Rows(of.train[:1], questions=of.questions)
            context = Context(model, asked, {}, Artifact(Path(scratch) / name), 0, "", lambda: None)
            sequences.askable(context, tokenizer)
            for part, what in ((of.train, "rows"), (of.test or (), "held-out rows")):
                tally = sequences.Tally(name, spec.data.on_bad_row == "skip")
                for _ in sequences.encode_rows(part[:RENDERED], partial(encode, tokenizer), tally):
                    pass
                if len(part) > RENDERED:
                    untried.append(f"{name}: only the first {RENDERED} of {len(part)} {what} went through the template")
    return untried


def check_trackers(stages: dict[str, StageSpec]) -> None:
    """Raises UserError for a tracker that is not installed."""
    for name, spec in stages.items():
        for tracker in trackers.chosen(spec.train.get("report_to")):
            if not trackers.installed(tracker):
                raise UserError(
                    f"stages.{name}.train.report_to: {tracker} is not installed. Install it (pip install {tracker}), "
                    "or leave it out"
                )


def check_engines(model: ModelSpec, stages: dict[str, StageSpec]) -> None:
    """Raises UserError for an engine that is not there, or whose adapters are not of the recipe's kind."""
    for name, spec in stages.items():
        settings = getattr(spec, "rollout", None)
        if settings is None:
            continue
        find_python(settings, f"stages.{name}.rollout")
        for word in NOT_BY_VLLM:
            if model.lora.get(word) not in (None, False, "none"):
                raise UserError(
                    f"model.lora.{word}: vLLM has no such adapters, and stages.{name}.rollout asks for vLLM"
                )


def check_liger(model: ModelSpec, stages: dict[str, StageSpec]) -> None:
    """Raises UserError for a stage that asks for Liger's kernels where they cannot be had."""
    asking = [name for name, spec in stages.items() if spec.train.get("use_liger_kernel")]
    if asking:
        from pipeline.models import liger

        liger.check(None if model.base.endswith(".gguf") else read_config(model)[0].get("model_type"), asking[0])


def check_base(model: ModelSpec, stages: dict[str, StageSpec]) -> None:
    """Raises UserError for a base that cannot do what the stages ask of it, by its config.json. Reads no weights."""
    from pipeline.stages import STAGES

    if model.base.endswith(".gguf"):  # what architecture that is, only its weights' file tells
        return
    check_weights(Path(model.base))
    headed = [name for name, spec in stages.items() if STAGES[spec.kind].score_head]
    packed = [name for name, spec in stages.items() if STAGES[spec.kind].arguments(spec).get("packing")]
    try:
        config = read_config(model)[0]
    except UserError:
        if headed:
            raise
        return  # the run will say it
    kind = config.get("model_type")
    if kind not in _model_types(LANGUAGE_MODELS):
        raise UserError(
            f"model.base: {model.base} is of the type '{kind}', of which transformers loads no causal language model. "
            "Where a family has a text-only model beside one that sees, choose the text-only one"
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if model.quantize != "none" and method not in (None, "bitsandbytes"):
        raise UserError(
            f"model.base: the weights of {model.base} are published in {method}, which cannot be quantised to "
            f"{model.quantize} again. Choose the same model with 16-bit weights"
        )
    if headed and kind not in _model_types(SEQUENCE_CLASSIFIERS):
        raise UserError(
            f"stages.{headed[0]}: a base of the type '{kind}' ({model.base}) has no reward model, as transformers has "
            "no sequence-classification head for it. Leave the stage out: dpo learns from the same comparisons, and "
            "ppo can be paid by a function (path.py:function)"
        )
    mixing = {*config.get("layer_types", ()), *(config.get("text_config") or {}).get("layer_types", ())} - ATTENDING
    if packed and mixing:
        raise UserError(unpackable(packed[0], f"{model.base} has {', '.join(sorted(mixing))} layers"))


def check_weights(folder: Path) -> None:
    """Raises UserError for a file of weights in a local folder that is cut short or missing, by its header alone."""
    for file in sorted(folder.glob("*.safetensors")):
        size, needed = file.stat().st_size, 0
        try:
            with file.open("rb") as bytes_:
                length = int.from_bytes(bytes_.read(8), "little")
                header = json.loads(bytes_.read(min(length, size)))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            needed = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, AttributeError):
            needed = -1
        if size != needed:
            raise UserError(f"model.base: {file} is damaged or not whole: it has {size} bytes. Fetch the model again")
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"model.base: {index} is damaged. Fetch the model again") from None
        if missing := [name for name in named if not (folder / name).is_file()]:
            raise UserError(f"model.base: {folder} lacks {missing[0]}, which {index.name} names. Fetch the model again")


@cache
def _model_types(table: str) -> frozenset[str]:
    """The model types of which transformers has such a class, read from its source: importing it to look them up would
    load torch."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed. Install the project: pip install -e .")
    file = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assigned = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table
    )
    return frozenset(kind for kind, _ in ast.literal_eval(assigned.args[0]))  # type: ignore[attr-defined]


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
