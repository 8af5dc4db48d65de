"""How long a run will take on this machine: said before it begins, and corrected by the stages that are done."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.language.say import say
from pipeline.models.dtype import known_for_cpu, known_speed
from pipeline.plan import auto, cards
from pipeline.plan.cards import Card
from pipeline.plan.lengths import Lengths, cut_again, mixed, tokens_of
from pipeline.plan.shapes import Shapes, read_shapes
from pipeline.plan.sizes import AUTO
from pipeline.plan.stage import planned_model
from pipeline.plan.whole import Duration, RowTokens, stage_duration
from pipeline.recipe.recipe import Recipe
from pipeline.runs.dtype import begun_in
from pipeline.runs.environment import make_environment
from pipeline.stages.stage import Rows

ROWS_AT_MOST = 200_000
"""Of a stage that are looked at for an estimate."""
MEASURED = 1.0
"""Seconds for which this machine's CPU is measured, once."""
PATIENCE = 60
"""Seconds within which the process that measures must have loaded its libraries and ended."""


@dataclass
class Clock:
    """What is left of a run, by its estimate and by how long the stages before took in fact."""

    durations: dict[str, Duration]
    """Of the stages that will run, in order; empty where nothing is known."""
    spent: float = 0.0
    done: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    @property
    def whole(self) -> float:
        return sum(duration.whole for duration in self.durations.values())

    def finish(self, stage: str) -> None:
        self.done.append(stage)
        self.spent = time.monotonic() - self.begun

    def after_training(self, stage: str) -> float | None:
        """Seconds from a stage's last step to the end of the run."""
        if stage not in self.durations:
            return None
        left = [name for name in self.durations if name not in self.done and name != stage]
        expected = sum(self.durations[name].whole for name in self.done)
        pace = self.spent / expected if expected else 1.0
        return pace * (self.durations[stage].after + sum(self.durations[name].whole for name in left))


def estimate(recipe: Recipe, runs: Path, rows: Mapping[str, Rows], trained: set[str], cores: str) -> Clock:
    """The time of the stages whose rows are given. `trained`: those that are to be measured alone. `cores`: that a
    stage computes with."""
    try:
        return Clock(_durations(recipe, runs, rows, trained, cores))
    except Exception:  # of a model, a card or a file that is not known; a run is not to end for want of an estimate
        return Clock({})


def spoken(seconds: float) -> str:
    """As a person says it."""
    if seconds < 90:
        return say("about a minute")  # a stage takes half of one to load and to measure, and twice that beside others
    if seconds < 90 * 60:
        return say("about {n} minutes", n=f"{seconds / 60:.0f}")
    return say("about {n} hours", n=f"{seconds / 3600:.1f}")


def _durations(
    recipe: Recipe, runs: Path, rows: Mapping[str, Rows], trained: set[str], cores: str
) -> dict[str, Duration]:
    spec, shapes = recipe.spec.model, read_shapes(recipe.spec.model)
    card = cards.detect_card()
    if spec.dtype == AUTO:
        begun = next(iter(begun_in(recipe, runs).values()), None)
        if card is None and begun is None:
            _measure(shapes, cores)
            chosen = known_for_cpu(shapes.hidden, shapes.intermediate)
            begun = chosen.dtype if chosen else "float32"
        spec = spec.model_copy(update={"dtype": begun or "bfloat16"})
    card = card or _this_cpu(shapes, spec.dtype, cores)
    if card is None or any(len(stage.train) > ROWS_AT_MOST for stage in rows.values()):
        return {}
    model, found, asked = planned_model(spec, shapes), dict[str, Duration](), _asked(recipe)
    for name, own in rows.items():
        kind, section = recipe.kind(name), recipe.stages[name]
        parent = recipe.parents(name).get("policy")
        again = [cut_again(e.kind, e.section, tokens_of(e.rows)) for e in own.earlier.values()]
        tokens = RowTokens(
            mixed(section, tokens_of(own.train), again),
            tokens_of(own.test or []),
            tokens_of(own.questions),
            asked_before=parent is None or asked.get(parent) != asked.get(name),
            again=again,
        )
        section = auto.resolve(kind, section, model, spec, Lengths(tokens.train, tokens.again), card)
        duration = stage_duration(kind, section, model, spec, tokens, card)
        if duration is None:
            return {}
        found[name] = replace(duration, training=0.0) if name in trained else duration
    return found


def _asked(recipe: Recipe) -> dict[str, str | None]:
    return {name: section.question_file() for name, section in recipe.stages.items()}


def _this_cpu(shapes: Shapes, dtype: str, cores: str) -> Card | None:
    speed = known_speed(shapes.hidden, shapes.intermediate, dtype)
    if speed is None:
        _measure(shapes, cores)
        speed = known_speed(shapes.hidden, shapes.intermediate, dtype)
    return None if speed is None else cards.this_cpu(speed)


def _measure(shapes: Shapes, cores: str) -> None:
    """Have this CPU measured and the result remembered, in a process of its own: this one stays without torch."""
    code = f"from pipeline.models.dtype import measure; measure({shapes.hidden}, {shapes.intermediate}, {MEASURED})"
    variables = {**make_environment(), "OMP_NUM_THREADS": cores}
    subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, timeout=PATIENCE, check=False)
