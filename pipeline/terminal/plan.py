"""What a run would do and need: a column for each stage, a row for each part of its memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from pipeline.disk.manifest import Dtype
from pipeline.errors import UserError
from pipeline.models.dtype import known_for_cpu
from pipeline.models.spec import ModelSpec, hub_commit
from pipeline.plan import auto, cards
from pipeline.plan.cards import Card
from pipeline.plan.memory import CONTEXT
from pipeline.plan.shapes import Shapes, read_shapes
from pipeline.plan.sizes import AUTO
from pipeline.plan.stage import Planned, lengths_of, plan_stage, planned_model
from pipeline.recipe.recipe import Recipe
from pipeline.runs.dtype import begun_in
from pipeline.runs.states import states
from pipeline.terminal.states import show_states

GIB = 2**30
ROWS: list[tuple[str, Callable[[Planned], int]]] = [
    ("weights in 4 bits", lambda stage: stage.memory.quantised),
    ("weights in bf16", lambda stage: stage.memory.unquantised),
    ("adapters", lambda stage: stage.memory.adapters),
    ("gradients", lambda stage: stage.memory.gradients),
    ("optimizer", lambda stage: stage.memory.optimizer),
    ("activations", lambda stage: stage.memory.activations),
    ("logits and loss", lambda stage: stage.memory.logits),
    ("= peak of a training step", lambda stage: stage.memory.training),
    ("KV cache of rollouts", lambda stage: stage.memory.cache),
    ("= peak of rollout, scoring", lambda stage: stage.memory.rollout),
    ("= peak of evaluation", lambda stage: stage.memory.evaluation),
    ("CUDA context, fragments", lambda stage: CONTEXT),
    ("total on the GPU", lambda stage: stage.memory.total),
]


def show_plan(recipe: Recipe, runs: Path, card: Card | None, console: Console) -> None:
    """What the next run would do, and what each stage needs; the one where the other cannot be told.

    Raises UserError if what would run cannot be told and the shapes are no known ones either.
    """
    unknown, begun = None, dict[str, Dtype]()
    try:
        show_states(states(recipe, runs), console)
        begun = begun_in(recipe, runs)
    except UserError as error:  # its needs follow from shapes alone
        unknown = error
    noted = ""
    try:
        noted = show_needs(recipe, begun, card, console).noted
    except UserError as error:
        console.print(f"memory and time: not planned: {error}", highlight=False, markup=False)
    base = recipe.spec.model
    if unknown and noted and hub_commit(base.base, base.revision)[1]:  # well known; only the Hub is out of reach
        console.print(f"\nwhat would run is not known: {unknown}", highlight=False, markup=False)
    elif unknown:
        raise unknown


def show_needs(recipe: Recipe, begun: Mapping[str, Dtype], card: Card | None, console: Console) -> Shapes:
    """What every stage needs: memory, time, disk; from the shapes in the base's config.json, which are returned.
    `begun`: what the run's stages compute in, of those that have begun.

    Raises UserError with the reason where the shapes cannot be read or are not of a known kind.
    """
    spec = recipe.spec.model
    shapes = read_shapes(spec)
    if spec.dtype == AUTO:
        dtype, why = _planned_dtype(begun, shapes, card)
        spec = spec.model_copy(update={"dtype": dtype})
        console.print(f"\nmodel.dtype: auto is planned as {dtype}: {why}", highlight=False, markup=False)
    if card is None and any(auto.find_autos(section) for section in recipe.stages.values()):
        card = cards.half_of_ram()  # as `onebase run` takes it
        console.print("\nno GPU here: auto is planned as it would be chosen on this machine; --gpu names a card")
    planned = plan_stages(recipe, spec, shapes, card)
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(spec.dtype, "fp32")
    console.print()
    _show_table(planned, shapes, card, half, console)
    if shapes.noted:
        console.print(
            f"{spec.base}: its shapes are as this package noted them on {shapes.noted}, since its config.json is "
            "not on this disk and the Hub did not give it.",
            style="dim", highlight=False, markup=False,
        )  # fmt: skip
    return shapes


def plan_stages(recipe: Recipe, spec: ModelSpec, shapes: Shapes, card: Card | None) -> dict[str, Planned]:
    """What each stage needs, autos chosen. `spec`: of the base, its dtype settled.

    Raises UserError where that cannot be told, or where auto finds nothing that fits."""
    model = planned_model(spec, shapes)
    planned = {}
    for name in recipe.order():
        kind, section = recipe.kind(name), recipe.stages[name]
        lengths = lengths_of(section, kind.contract, recipe.spec.seed)
        if card:
            section = auto.resolve(kind, section, model, spec, lengths, card)
        planned[name] = plan_stage(kind, section, model, spec, lengths, card)
    return planned


def _planned_dtype(begun: Mapping[str, Dtype], shapes: Shapes, card: Card | None) -> tuple[Dtype, str]:
    """What auto stands for, and why; where only the first run finds out, what takes the most memory."""
    for name, dtype in begun.items():
        return dtype, f"as in '{name}'"
    if card:
        return "bfloat16", "on a GPU that, or float16, which takes as much"
    known = known_for_cpu(shapes.hidden, shapes.intermediate)
    if known:
        return known.dtype, known.why
    return "float32", "the most it takes on a CPU; the first run measures what is faster here"


def _show_table(planned: dict[str, Planned], shapes: Shapes, card: Card | None, half: str, console: Console) -> None:
    """The memory of each stage in GiB, whether it fits, and how long it takes."""
    where = f"on {card.name}, {card.room / GIB:.1f} GiB free" if card else "no GPU here; --gpu names one"
    title = f"memory in GiB at each stage's peak, {shapes.parameters / 1e9:.3g}B parameters ({where})"
    table = Table(Column("", no_wrap=True), title=title, title_justify="left", box=None, pad_edge=False)
    for name in planned:
        table.add_column(name, justify="right")
    for label, read in ROWS:
        style = "bold" if label.startswith("total") else "dim" if label.startswith("=") else None
        table.add_row(label.replace("bf16", half), *(_gib(read(stage)) for stage in planned.values()), style=style)
    if card:
        table.add_row("fits", *(_fits(stage, card) for stage in planned.values()))
    table.add_row("longest batch", *(f"{stage.work.rows} x {stage.work.length}" for stage in planned.values()))
    layers = shapes.layers
    table.add_row("layers checkpointed", *(f"{s.work.checkpointed} of {layers}" for s in planned.values()))
    table.add_row("tokens/s", *(_or_none(stage.tokens_per_second, "{:.0f}") for stage in planned.values()))
    table.add_row("minutes of training", *(_minutes(stage.minutes) for stage in planned.values()))
    table.add_row("disk, GB", *(f"{stage.disk / 1e9:.2f}" for stage in planned.values()))
    table.add_row("merging, RAM included", *(_gib(stage.memory.merging) for stage in planned.values()))
    console.print(table)
    base = shapes.parameters * 2 / 1e9
    reached = f"{card.reached:.0%} of {card.name}'s {card.teraflops:g} bf16 TFLOPS" if card and card.teraflops else ""
    notes = [
        "The total is what always stays (weights to optimizer), the largest peak (=) and the context.",
        f"The base is another {base:.3g} GB on disk. Lengths are estimated at 4 bytes of text a token.",
        f"Times are a roofline at {reached}; evaluation is not in them." if reached else "",
    ]
    for note in filter(None, notes):
        console.print(note, style="dim", highlight=False, markup=False)


def _gib(amount: int) -> str:
    return f"{amount / GIB:.2f}" if amount else "-"


def _fits(stage: Planned, card: Card) -> str:
    spare = (card.room - stage.memory.total) / GIB
    if spare < 0:
        return f"[red]no, {-spare:.1f} over[/red]"
    return f"[green]yes, {spare:.1f} free[/green]" if spare > 0.03 * card.room / GIB else "[yellow]barely[/yellow]"


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _minutes(minutes: float | None) -> str:
    return "-" if minutes is None else "<1" if minutes < 1 else f"{minutes:.0f}"
