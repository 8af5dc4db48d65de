"""The numbers that stand for a stage's autos, chosen for this machine and noted in chosen.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.disk.atomic import Json, read_json, write_json
from pipeline.language.say import say
from pipeline.models.spec import ModelSpec
from pipeline.plan import auto, cards
from pipeline.plan.cards import Card
from pipeline.plan.lengths import lengths_of
from pipeline.plan.memory import CONTEXT
from pipeline.plan.shapes import read_shapes
from pipeline.plan.stage import planned_model
from pipeline.recipe.recipe import Recipe
from pipeline.runs.recipe_file import write_recipe
from pipeline.stages.stage import StageSpec

if TYPE_CHECKING:
    from accelerate import PartialState


def choose_section(
    recipe: Recipe, stage: str, model: ModelSpec, runs: Path, fingerprint: str, processes: PartialState
) -> StageSpec:
    """The stage's section with a number for every auto: those an earlier start of this stage chose, or those that fit
    this machine best. The first process chooses and notes it, also in comments of the run's recipe.yaml, for the word
    itself is what counts; the others, whose memory may differ, take what it has chosen."""
    from accelerate.utils import broadcast_object_list

    section = recipe.stages[stage]
    if not auto.find_autos(section):
        return section
    chosen = _choose(recipe, stage, model, runs, fingerprint) if processes.is_main_process else {}
    return auto.fill_in(section, broadcast_object_list([chosen])[0])


def _choose(recipe: Recipe, stage: str, spec: ModelSpec, runs: Path, fingerprint: str) -> Json:
    section, file = recipe.stages[stage], recipe.artifact(stage, runs).chosen
    noted = read_json(file) or {}
    if noted.get("fingerprint") != fingerprint:
        kind, card = recipe.kind(stage), _this_machine()
        again = [(recipe.kind(other), recipe.stages[other]) for other in recipe.learnt_again(stage)]
        lengths = lengths_of(section, kind.contract, recipe.spec.seed, again)
        model = planned_model(spec, read_shapes(spec))
        chosen = auto.choose(kind, section, model, spec, lengths, card)
        noted = {"fingerprint": fingerprint, "for": f"{card.name}, {card.memory / 2**30:.3g} GiB", "chosen": chosen}
        write_json(file, noted)
        resolved = runs / recipe.name / "recipe.yaml"
        if resolved.is_file():
            write_recipe(recipe, resolved, runs)
    settings = ", ".join(f"{key} {value}" for key, value in noted["chosen"].items())
    print("  " + say("auto, on {machine}: {settings}", machine=noted["for"], settings=settings), flush=True)
    return dict(noted["chosen"])


def _this_machine() -> Card:
    """The GPU that is trained on; without one half of the RAM."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        # what is not free is held by others, and by the context that this process has just opened
        return cards.describe_card(torch.cuda.get_device_name(), min(total, free + CONTEXT), usable=1.0)
    return cards.half_of_ram()
