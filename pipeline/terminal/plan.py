"""What a run would do and need: a column for each stage, a row for each part of its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Dtype
from pipeline.errors import UserError
from pipeline.language.say import kept, say, say_again, translated
from pipeline.models.dtype import known_for_cpu
from pipeline.models.spec import ModelSpec, hub_commit
from pipeline.plan import auto, cards
from pipeline.plan.cards import Card
from pipeline.plan.lengths import lengths_of
from pipeline.plan.memory import CONTEXT
from pipeline.plan.shapes import Shapes, read_shapes
from pipeline.plan.sizes import AUTO
from pipeline.plan.stage import Planned, plan_stage, planned_model
from pipeline.recipe.recipe import Recipe
from pipeline.runs.dtype import begun_in
from pipeline.runs.states import State, standing
from pipeline.terminal.console import Row, print_matrix
from pipeline.terminal.states import show_states

GIB = 2**30
ENGINE = kept("vLLM between rollouts")
ROWS: list[tuple[str, Callable[[Planned], int]]] = [
    (kept("weights in 4 bits"), lambda stage: stage.memory.quantised),
    (kept("weights in bf16"), lambda stage: stage.memory.unquantised),
    (kept("adapters"), lambda stage: stage.memory.adapters),
    (kept("gradients"), lambda stage: stage.memory.gradients),
    (kept("optimizer"), lambda stage: stage.memory.optimizer),
    (ENGINE, lambda stage: stage.memory.engine),
    (kept("activations"), lambda stage: stage.memory.activations),
    (kept("logits and loss"), lambda stage: stage.memory.logits),
    (kept("= peak of a training step"), lambda stage: stage.memory.training),
    (kept("KV cache of rollouts"), lambda stage: stage.memory.cache),
    (kept("= peak of rollout, scoring"), lambda stage: stage.memory.rollout),
    (kept("= peak of evaluation"), lambda stage: stage.memory.evaluation),
    (kept("CUDA context, fragments"), lambda stage: CONTEXT),
    (kept("total on the GPU"), lambda stage: stage.memory.total),
]


@dataclass(frozen=True)
class Needs:
    """What every stage needs on a card. `dtype`: what the base is planned to compute in, and `why` where the recipe
    leaves it open. `assumed`: there is no card, and auto was planned for this machine's RAM."""

    spec: ModelSpec
    dtype: str
    why: str
    shapes: Shapes
    card: Card | None
    assumed: bool
    stages: dict[str, Planned]


@dataclass(frozen=True)
class Plan:
    """What the next run would do, and what each stage needs; where one of them cannot be told, the reason."""

    states: list[State] | UserError
    needs: Needs | UserError

    def hold(self, base: ModelSpec) -> None:
        """Raises UserError if what would run cannot be told and the shapes are no known ones either."""
        known = isinstance(self.needs, Needs) and self.needs.shapes.noted
        # of a base that is well known, only the Hub is out of reach
        if isinstance(self.states, UserError) and not (known and hub_commit(base.base, base.revision)[1]):
            raise self.states


def make_plan(recipe: Recipe, runs: Path, card: Card | None) -> Plan:
    begun = dict[str, Dtype]()
    try:
        found: list[State] | UserError = standing(recipe, runs)
        begun = begun_in(recipe, runs)
    except UserError as error:  # what a stage needs follows from shapes alone
        found = error
    try:
        return Plan(found, find_needs(recipe, begun, card))
    except UserError as error:
        return Plan(found, error)


def show_plan(recipe: Recipe, runs: Path, card: Card | None, console: Console) -> None:
    plan = make_plan(recipe, runs, card)
    if not isinstance(plan.states, UserError):
        show_states(plan.states, console)
    if isinstance(plan.needs, UserError):
        console.print(say("memory and time: not planned: {error}", error=plan.needs), markup=False)
    else:
        show_needs(plan.needs, console)
    plan.hold(recipe.spec.model)
    if isinstance(plan.states, UserError):
        console.print("\n" + say("what would run is not known: {error}", error=plan.states), markup=False)


def plan_as_json(recipe: Recipe, runs: Path, card: Card | None) -> Json:
    """Memory and disk in bytes; null for what cannot be told."""
    plan = make_plan(recipe, runs, card)
    plan.hold(recipe.spec.model)
    needs = None if isinstance(plan.needs, UserError) else plan.needs
    where = {} if isinstance(plan.states, UserError) else {state.name: state for state in plan.states}
    stages = {}
    for name in recipe.order():
        state, needed = where.get(name), needs.stages[name] if needs else None
        stages[name] = {"state": state and state.word, "why": state and state.why, "needs": needed and _figures(needed)}
    card = needs.card if needs else card
    told = (
        {"dtype": needs.dtype, "parameters": needs.shapes.parameters} if needs else {"dtype": None, "parameters": None}
    )
    return {"recipe": recipe.name, "card": card, "room": card and card.room, **told, "stages": stages}


def _figures(stage: Planned) -> Json:
    return {
        "work": stage.work,
        "memory": stage.memory,
        "context": CONTEXT,
        "total": stage.memory.total,
        "fits": stage.fits,
        "tokens_per_second": stage.tokens_per_second,
        "minutes": stage.minutes,
        "disk": stage.disk,
    }


def find_needs(recipe: Recipe, begun: Mapping[str, Dtype], card: Card | None) -> Needs:
    """Memory, time and disk of every stage, from the shapes in the base's config.json. `begun`: what the run's stages
    compute in, of those that have begun.

    Raises UserError with the reason where the shapes cannot be read or are not of a known kind.
    """
    spec, why = recipe.spec.model, ""
    shapes = read_shapes(spec)
    if spec.dtype == AUTO:
        dtype, why = _planned_dtype(begun, shapes, card)
        spec = spec.model_copy(update={"dtype": dtype})
    assumed = card is None and any(auto.find_autos(section) for section in recipe.stages.values())
    if assumed:
        card = cards.half_of_ram()  # as `onebase run` takes it
    return Needs(spec, spec.dtype, why, shapes, card, assumed, plan_stages(recipe, spec, shapes, card))


def show_needs(needs: Needs, console: Console) -> None:
    if needs.why:
        told = say("model.dtype: auto is planned as {dtype}: {why}", dtype=needs.dtype, why=needs.why)
        console.print(f"\n{told}", markup=False)
    if needs.assumed:
        console.print(
            "\n"
            + say("There is no GPU here. auto is planned as it would be chosen on this machine. --gpu names a card.")
        )
    console.print()
    _show_table(needs, console)
    if needs.shapes.noted:
        console.print(
            say(
                "{base}: its shapes are as this package noted them on {date}, since its config.json is not on this "
                "disk and the Hub did not give it.",
                base=needs.spec.base,
                date=needs.shapes.noted,
            ),
            style="dim",
            markup=False,
        )


def plan_stages(recipe: Recipe, spec: ModelSpec, shapes: Shapes, card: Card | None) -> dict[str, Planned]:
    """What each stage needs, autos chosen. `spec`: of the base, its dtype settled.

    Raises UserError where that cannot be told, or where auto finds nothing that fits."""
    model = planned_model(spec, shapes)
    planned = {}
    for name in recipe.order():
        kind, section = recipe.kind(name), recipe.stages[name]
        again = [(recipe.kind(other), recipe.stages[other]) for other in recipe.learnt_again(name)]
        lengths = lengths_of(section, kind.contract, recipe.spec.seed, again)
        if card:
            section = auto.resolve(kind, section, model, spec, lengths, card)
        planned[name] = plan_stage(kind, section, model, spec, lengths, card)
    return planned


def _planned_dtype(begun: Mapping[str, Dtype], shapes: Shapes, card: Card | None) -> tuple[Dtype, str]:
    """What auto stands for, and why; where only the first run finds out, what takes the most memory."""
    for name, dtype in begun.items():
        return dtype, say("as in '{name}'", name=name)
    if card:
        return "bfloat16", say("a GPU computes in it or in float16, which takes as much memory")
    known = known_for_cpu(shapes.hidden, shapes.intermediate)
    if known:
        return known.dtype, say_again(known.why)
    return "float32", say("the most it takes on a CPU; the first run measures what is faster here")


def _show_table(needs: Needs, console: Console) -> None:
    """The memory of each stage in GiB, whether it fits, and how long it takes."""
    shapes, card, stages = needs.shapes, needs.card, list(needs.stages.values())
    where = say("no GPU here; --gpu names one")
    if card:
        where = say("on {card}, {room} GiB free", card=card.name, room=f"{card.room / GIB:.1f}")
    size = f"{shapes.parameters / 1e9:.3g}B"
    title = say("Peak memory in GiB, {size} parameters ({where})", size=size, where=where)
    console.print(title, style="italic", markup=False)
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(needs.dtype, "fp32")
    styles = {"=": "dim", "t": "bold"}

    on_cpu = {"CUDA context, fragments": say("libraries, fragments"), "total on the GPU": say("total memory")}
    labels = on_cpu if card is None or needs.assumed else {}

    def checkpointed(stage: Planned) -> str:
        return say("{n} of {all}", n=stage.work.checkpointed, all=shapes.layers)

    rows = [
        Row(
            labels.get(label, translated(label)).replace("bf16", half),
            [_gib(read(stage)) for stage in stages],
            styles.get(label[0], ""),
        )
        for label, read in ROWS
        if label != ENGINE or any(stage.memory.engine for stage in stages)
    ]
    if card:
        rows.append(Row(say("fits"), [_fits(stage, card) for stage in stages]))
        rows.append(Row(say("GiB to spare"), [f"{(card.room - stage.memory.total) / GIB:.1f}" for stage in stages]))
    rows += [
        Row(say("longest batch"), [f"{stage.work.rows} x {stage.work.length}" for stage in stages]),
        Row(say("layers checkpointed"), [checkpointed(stage) for stage in stages]),
        Row(say("tokens/s"), [_or_none(stage.tokens_per_second, "{:.0f}") for stage in stages]),
        Row(say("minutes of training"), [_minutes(stage.minutes) for stage in stages]),
        Row(say("disk, GB"), [f"{stage.disk / 1e9:.2f}" for stage in stages]),
        Row(say("merging, RAM included"), [_gib(stage.memory.merging) for stage in stages]),
    ]
    print_matrix("", list(needs.stages), rows, console)
    base = shapes.parameters * 2 / 1e9
    notes = [
        say("Total = what always stays (weights to optimizer) + the largest peak (=) + the fragments."),
        say("The base takes {gb} GB more on disk. Lengths are estimated at 4 bytes of text a token.", gb=f"{base:.3g}"),
    ]
    if card and card.teraflops:
        notes.append(
            say(
                "Times are estimated at {share} of {card}'s {teraflops} bf16 TFLOPS. They do not include evaluation.",
                share=f"{card.reached:.0%}",
                card=card.name,
                teraflops=f"{card.teraflops:g}",
            )
        )
    for note in notes:
        console.print(note, style="dim", markup=False)


def _gib(amount: int) -> str:
    return f"{amount / GIB:.2f}" if amount else "-"


def _fits(stage: Planned, card: Card) -> Text:
    spare = card.room - stage.memory.total
    if spare < 0:
        return Text(say("no"), style="red")
    return Text(say("yes"), style="green") if spare > 0.03 * card.room else Text(say("barely"), style="yellow")


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _minutes(minutes: float | None) -> str:
    return "-" if minutes is None else "<1" if minutes < 1 else f"{minutes:.0f}"
