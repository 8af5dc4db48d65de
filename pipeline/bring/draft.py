"""A recipe made of five answers: what each stage eats, in which words it is written, and whether it fits the card."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.bring.rows import File, list_parts
from pipeline.data.load import DataSpec, Part, read_split
from pipeline.data.prompts import first_question
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.plan.cards import GIB, Card, half_of_ram
from pipeline.plan.shapes import Shapes, read_shapes
from pipeline.plan.stage import Planned
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.rows import load_rows
from pipeline.stages import STAGES
from pipeline.stages.check import check_rendering
from pipeline.terminal.console import counted
from pipeline.terminal.plan import plan_stages

SEED = 17
COUNTED = 1000
"""Prompts that are counted, to know whether some can be held out."""
PACKED = 1024
"""Tokens of a packed row of documents."""


@dataclass(frozen=True)
class Goal:
    does: str
    stages: tuple[str, ...]
    needs: tuple[str, ...]
    """The stages it is nothing without; the others are left out where there are no rows for them."""
    example: str


GOALS = {
    "follow": Goal("follow instructions, from good answers", ("sft",), ("sft",), '{"prompt", "completion"}'),
    "prefer": Goal("prefer the better of two answers", ("sft", "dpo"), ("dpo",), '{"prompt", "chosen", "rejected"}'),
    "thumbs": Goal(
        "learn from answers with thumbs up or down", ("sft", "kto"), ("kto",), '{"prompt", "completion", "label": true}'
    ),
    "classify": Goal("classify texts", ("classify",), ("classify",), '{"text", "label"}'),
    "corpus": Goal("continue a corpus of documents", ("pretrain",), ("pretrain",), '{"text"}'),
    "chain": Goal(
        "the whole chain: answers, a reward model, DPO and PPO",
        ("pretrain", "sft", "reward", "dpo", "ppo"), ("dpo",), '{"prompt", "chosen", "rejected"}',
    ),
}  # fmt: skip
TRAIN: dict[str, dict[str, Any]] = {
    "pretrain": {"learning_rate": 1e-4, "num_train_epochs": 1},
    "sft": {"learning_rate": 2e-4, "num_train_epochs": 2},
    "classify": {"learning_rate": 2e-4, "num_train_epochs": 2},
    "reward": {"learning_rate": 1e-4, "num_train_epochs": 1, "center_rewards_coefficient": 0.01},
    "dpo": {"learning_rate": 1e-5, "num_train_epochs": 1, "beta": 0.1},
    "kto": {  # its KL term is taken over the rows of a batch: a number, the same on every card, and no order by length
        "learning_rate": 1e-5, "num_train_epochs": 1, "beta": 0.1, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "train_sampling_strategy": "sequential",
    },
    "ppo": {"steps": 100, "batch_size": 32, "response_length": 128, "learning_rate": 1e-5, "kl_coef": 0.05},
}  # fmt: skip
ABOUT = {
    "pretrain": "reads documents",
    "sft": "learns to answer from answers",
    "classify": "puts texts into classes",
    "reward": "learns to tell the better answer",
    "dpo": "learns from the same comparisons directly",
    "kto": "learns from answers with thumbs up or down",
    "ppo": "tries answers, and is paid by the reward model",
}
BETTER_WITHOUT = {"sft": {"dpo"}, "ppo": {"sft", "dpo"}, "pretrain": {"sft"}}
"""Files that are made for other stages are left to them, where there are files of its own."""
ASK = {
    "German": "Welches Etikett passt zu diesem Text: {labels}?\n\n{text}",
    "French": "Quelle étiquette convient à ce texte : {labels} ?\n\n{text}",
    "Spanish": "¿Qué etiqueta corresponde a este texto: {labels}?\n\n{text}",
    "Italian": "Quale etichetta è adatta a questo testo: {labels}?\n\n{text}",
    "Portuguese": "Qual etiqueta corresponde a este texto: {labels}?\n\n{text}",
}
"""What a policy without a head is asked of a text."""


@dataclass(frozen=True)
class Answers:
    name: str
    path: str
    files: list[File]
    goal: str
    language: str
    card: Card | None
    card_is_here: bool
    base: str
    encoding: str = ""


@dataclass(frozen=True)
class Draft:
    answers: Answers
    lines: list[str]
    told: dict[str, str]
    """Of each stage, the rows it takes."""
    planned: dict[str, Planned] = field(default_factory=dict)
    problem: str = ""
    """Why it could not be planned."""

    def text(self, file: str) -> str:
        """The recipe with its comments."""
        card, file = self.answers.card, " ".join(file.split())
        gpu = f" --gpu {_word(card.name.replace(' ', ''))}" if card and not self.answers.card_is_here else ""
        goal = f"{GOALS[self.answers.goal].does}, in {self.answers.language}"
        commands = [f"onebase {word}" for word in (f"check {file}", f"data {file}", f"plan {file}{gpu}", f"run {file}")]
        abouts = ("is it sound", "what is in the data", "what it needs", "train what is not fresh")
        width = max(map(len, commands))
        listed = [f"#   {command:<{width}}   {about}" for command, about in zip(commands, abouts, strict=True)]
        return "\n".join([f"# {goal[0].upper()}{goal[1:]}.", "#", *listed, *self.lines, ""])

    def summary(self) -> list[str]:
        """A line a stage: its rows, what it needs of the card, how long it takes."""
        lines = []
        for name, rows in self.told.items():
            needs = ""
            if stage := self.planned.get(name):
                room = stage.card.room / GIB if stage.card else 0
                needs = f"; {stage.memory.total / GIB:.1f} of {room:.1f} GiB"
                needs += f", at most {_duration(stage.minutes)}" if stage.minutes is not None else ""
            lines.append(f"  {name}: {rows}{needs}")
        return [*lines, *([f"  not planned: {self.problem}"] if self.problem else [])]


def draft(answers: Answers) -> Draft:
    """Raises UserError where the rows are unfit, or the base does not fit the card."""
    shapes, problem = None, ""
    try:
        shapes = read_shapes(ModelSpec(base=answers.base))
    except UserError as error:
        problem = str(error)
    data, told = {}, {}
    for kind in GOALS[answers.goal].stages:
        if files := _files_for(kind, answers.files):
            data[kind], told[kind] = _data_of(kind, files, answers)
    lines = _write(answers, data, told, shapes)
    recipe = build(*_parsed("\n".join(lines)))
    for kind in recipe.order():
        try:
            load_rows(recipe, kind)
        except UserError:
            if "test" not in data[kind]:
                raise
            # Held out at random, a rare class may be missing on one side: then all rows are trained on.
            del data[kind]["test"]
            told[kind] += "; none held out, as rows of each kind are few"
    recipe = build(*_parsed("\n".join(_write(answers, data, told, shapes))))
    for kind in recipe.order():
        rows, _ = load_rows(recipe, kind)
        try:
            check_rendering(recipe.spec.model, {kind: recipe.stages[kind]}, {kind: rows})
        except UserError:
            lenient = recipe.stages[kind].model_copy(update={"data": _skipping(recipe.stages[kind].data)})
            check_rendering(recipe.spec.model, {kind: lenient}, {kind: rows})  # raises if no row is left
            data[kind]["on_bad_row"] = "skip"
            told[kind] += "; rows that the base's chat template cannot render are left out"
    lines = _write(answers, data, told, shapes)
    recipe = build(*_parsed("\n".join(lines)))
    if shapes is None:
        return Draft(answers, lines, told, problem=problem)
    return Draft(answers, lines, told, _plan(recipe, shapes, answers.card))


def _skipping(data: DataSpec) -> DataSpec:
    return data.model_copy(update={"on_bad_row": "skip"})


def _plan(recipe: Recipe, shapes: Shapes, card: Card | None) -> dict[str, Planned]:
    dtype = "bfloat16" if card else "float32"
    spec = recipe.spec.model.model_copy(update={"dtype": dtype})
    card = card or half_of_ram()
    planned = plan_stages(recipe, spec, shapes, card)
    for name, stage in planned.items():
        if not stage.fits:
            over = (stage.memory.total - card.room) / GIB
            raise UserError(
                f"{spec.base}: stage '{name}' is {over:.1f} GiB too large for {card.name}; name a smaller base"
            )
    return planned


def _duration(minutes: float) -> str:
    return f"{minutes / 60:.0f} hours" if minutes > 120 else f"{minutes:.0f} minutes" if minutes > 1.5 else "a minute"


def _parsed(text: str) -> tuple[dict[str, Any], tuple[()], str, dict[str, int]]:
    tree, lines = yaml.parse(text, "recipe")
    return tree, (), "recipe", lines


def _files_for(kind: str, files: list[File]) -> list[File]:
    usable = [file for file in files if kind in file.fits]
    return [file for file in usable if not file.fits & BETTER_WITHOUT.get(kind, set())] or usable


def _data_of(kind: str, files: list[File], answers: Answers) -> tuple[dict[str, Any], str]:
    """The data section of a stage, and what it comes to in words."""
    if len(files) == len(list_parts(answers.path)):
        source: dict[str, Any] = {"path": answers.path}
    elif len(files) == 1:
        source = {"path": files[0].path}
    else:
        source = {"mix": [{"path": file.path} for file in files]}
    if answers.encoding:
        source["encoding"] = answers.encoding
    parts = [Part(**each) for each in source["mix"]] if "mix" in source else None
    spec = DataSpec(path=source.get("path"), mix=parts, encoding=answers.encoding or "utf-8", on_bad_row="skip")
    split = read_split(spec, STAGES[kind].contract, SEED)
    prompts = len({first_question(row) for row in islice(split.train, COUNTED)})
    unfit = sum(source.reasons.total() for source in split.sources)
    layouts = sorted({layout for source in split.sources for layout in source.layouts})
    told = f"{counted(len(split.train), 'row')}, read as {', '.join(layouts)}"
    if prompts >= 20:
        source["test"] = 0.2 if kind == "classify" else 0.1
    elif prompts >= 4:
        source["test"] = 2
    else:
        told += "; too few to hold some out"
    if unfit:
        source["on_bad_row"] = "skip"
        first = next(source.refused[0] for source in split.sources if source.refused)
        why = "".join(each if each.isprintable() else " " for each in f"first {first['place']}: {first['reason']}")
        told += f"; {unfit} unfit are left out ({why}); a run lists them in runs/{answers.name}/{kind}/refused.jsonl"
    return source, told


def _write(answers: Answers, data: dict[str, Any], told: dict[str, str], shapes: Shapes | None) -> list[str]:
    """The recipe's lines, each word with a reason where it is not its own."""
    lines = [
        f"name: {_word(answers.name)}",
        f"seed: {SEED}",
        "model:",
        f"  base: {_word(answers.base)}",
        "  quantize: nf4                         # the frozen base in 4 bits; none for plain LoRA",
        "  lora: {r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear}",
        "train:                                  # every stage starts from these",
        "  per_device_train_batch_size: auto     # the fastest that fits",
        "  gradient_accumulation_steps: 16       # rows of an optimizer step, whatever fits at once",
        "  activation_checkpointing: auto        # in as few layers as there is room for",
        "  max_length: auto                      # the longest rows that fit",
        "  train_sampling_strategy: group_by_length",
        "  lr_scheduler_type: cosine",
        "  warmup_steps: 0.05",
        "  logging_steps: 5",
        "  save_steps: 50",
        "stages:",
    ]
    for kind, section in data.items():
        lines.append(f"  {kind}:".ljust(40) + f"# {ABOUT[kind]}; {told[kind]}")
        if from_ := _parent(kind, list(data)):
            lines.append(f"    from: {from_}")
        if kind == "ppo":
            lines.append("    reward: reward")
        lines.append(f"    data: {_flow(section)}")
        if kind == "classify" and answers.language in ASK:
            lines.append(f"    instruction: {_word(ASK[answers.language])}")
        train = dict(TRAIN[kind])
        if kind == "pretrain":
            train["max_length"] = min(PACKED, shapes.window) if shapes else PACKED
        if kind == "ppo" and shapes:
            train["response_length"] = min(train["response_length"], shapes.window // 4)
        lines.append(f"    train: {_flow(train)}")
    return lines


def _parent(kind: str, stages: list[str]) -> str:
    if kind == "sft":
        return "pretrain" if "pretrain" in stages else ""
    return "sft" if kind in ("reward", "dpo", "kto", "ppo") and "sft" in stages else ""


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return _word(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _word(text: str) -> str:
    """A text as YAML reads it back, whatever is in it. Raises UserError for what YAML cannot hold."""
    for written in (text, json.dumps(text, ensure_ascii=False), json.dumps(text)):
        try:
            if yaml.parse("{word: " + written + ", end: here}", text)[0] == {"word": text, "end": "here"}:
                return written
        except UserError:
            continue
    raise UserError(f"{text!r} cannot be written into a recipe: rename it")
