"""One dtype for a whole run, where its recipe says `model.dtype: auto`.

Stages hand each other a base in memory, and numbers that are proven to be the same on it. So what one of them has begun
in counts for all, wherever they go on; where none has begun, this machine chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.disk.atomic import digest
from pipeline.disk.manifest import Dtype
from pipeline.errors import UserError
from pipeline.language.say import say, say_again
from pipeline.models import published
from pipeline.models.dtype import Choice, choose
from pipeline.models.spec import ModelSpec
from pipeline.plan.sizes import AUTO
from pipeline.recipe.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import PartialState


def settle_run(recipe: Recipe, runs: Path, processes: PartialState) -> ModelSpec:
    """The model section with a real dtype. The first process chooses for all. Raises UserError as `settle` does."""
    from accelerate.utils import broadcast_object_list

    model = recipe.spec.model
    if model.dtype != AUTO:
        return model
    settled = settle(model, begun_in(recipe, runs)) if processes.is_main_process else model
    return model.model_copy(update={"dtype": broadcast_object_list([settled.dtype])[0]})


def settle(model: ModelSpec, begun: Mapping[str, Dtype]) -> ModelSpec:
    """The model section with a real dtype. Raises UserError where what is there already computes in several."""
    if model.dtype != AUTO:
        return model
    if len(set(begun.values())) > 1:
        told = ", ".join(f"'{name}' in {dtype}" for name, dtype in begun.items())
        raise UserError(
            f"model.dtype: auto means one type for the whole run, and its finished stages have several: {told}. Name "
            "one in the recipe (model.dtype: bfloat16); stages that were trained in another type are then trained again"
        )
    if begun:
        name, dtype = next(iter(begun.items()))
        choice = Choice(dtype, say("as in '{name}'", name=name))
    else:
        from pipeline.models.base import load_config

        config = load_config(model)
        inner = getattr(config, "intermediate_size", None)  # some architectures call it otherwise, or have several
        choice = choose(config.hidden_size, inner if isinstance(inner, int) else 4 * config.hidden_size)
    why = say_again(choice.why)
    print("  " + say("computes in {dtype}: {why}", dtype=choice.dtype, why=why), flush=True)
    return model.model_copy(update={"dtype": choice.dtype})


def begun_in(recipe: Recipe, runs: Path) -> dict[str, Dtype]:
    """What the stages of a run compute in, by name: those that are done, those with a checkpoint to go on from, and
    adapters from the Hub that they go on with."""
    found: dict[str, Dtype] = {}
    for name, parts in recipe.parts().items():
        on_hub = [parent.finished() for parent in recipe.parent_artifacts(name, runs).values() if parent.manifest()]
        found |= {f"{published.PREFIX}{parent.hub}": parent.dtype for parent in on_hub if parent.hub}
        out, fingerprint = recipe.artifact(name, runs), digest(parts)
        manifest, claim = out.manifest(), out.claimed() or {}
        if manifest and manifest.fingerprint == fingerprint:
            found[name] = manifest.dtype
        elif claim.get("fingerprint") == fingerprint and out.last_checkpoint(fingerprint):
            found[name] = claim["dtype"]
    return found
