"""What a person sees of a run: where each stage stands, what it gained, what the policies answer, what comes next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.artifact import WEIGHTS, Json
from pipeline.evaluate import verdicts
from pipeline.evaluate.metric import METRICS, Metric, columns, of_benchmark
from pipeline.evaluation_plan import verdicts_in
from pipeline.plan import auto, cards
from pipeline.plan.cards import Card
from pipeline.plan.shapes import Shapes, read_shapes
from pipeline.plan.stage import lengths_of, plan_stage, planned_model
from pipeline.plan.table import show_plan
from pipeline.recipe.recipe import Recipe
from pipeline.runner import State
from pipeline.stages.stage import Headline, StageSpec


def show_states(states: list[State], console: Console) -> None:
    """One line per stage: what the next run would do, and why."""
    table = Table("stage", "state", "why", box=None, pad_edge=False)
    colours = {"fresh": "green", "new": "cyan", "damaged": "red"}
    actions = {"fresh": "skipped", "unmeasured": "would be measured, not trained", "damaged": "would stop the run"}
    for state in states:
        action = f"{state.word}, {actions.get(state.word, 'would run')}"
        table.add_row(state.name, Text(action, style=colours.get(state.word, "yellow")), Text(state.why))
    console.print(table)


def show_needs(recipe: Recipe, card: Card | None, console: Console) -> Shapes:
    """What every stage needs: memory, time, disk; from the shapes in the base's config.json, which are returned.

    Raises UserError with the reason where the shapes cannot be read or are not of a known kind.
    """
    spec = recipe.spec.model
    shapes = read_shapes(spec)
    model = planned_model(spec, shapes)
    planned = {}
    if card is None and any(auto.asked(section) for section in recipe.stages.values()):
        card = cards.half_of_ram()  # as `onebase run` takes it
        console.print("\nno GPU here: auto is planned as it would be chosen on this machine; --gpu names a card")
    for name in recipe.order():
        kind, section = recipe.kind(name), recipe.stages[name]
        lengths = lengths_of(section, kind.contract, recipe.spec.seed)
        if card:
            section = auto.resolved(kind, section, model, spec, lengths, card)
        planned[name] = plan_stage(kind, section, model, spec, lengths, card)
    half = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[spec.dtype]
    console.print()
    show_plan(planned, shapes, card, half, console)
    if shapes.noted:
        console.print(
            f"{spec.base}: its shapes are as this package noted them on {shapes.noted}, since its config.json is "
            "not on this disk and the Hub did not give it.",
            style="dim", highlight=False, markup=False,
        )  # fmt: skip
    return shapes


def show_results(recipe: Recipe, runs: Path, console: Console) -> None:
    """The held-out numbers before and after every finished stage, with cost."""
    title = f"{recipe.name}: what each stage changed on held-out data"
    table = Table("stage", "number", title=title, title_justify="left")
    for column in ("before", "after", "change", "time", "peak MiB"):
        table.add_column(column, justify="right")
    evaluated, notes = verdicts_in(runs / recipe.name), list[str]()
    for name in recipe.order():
        manifest = recipe.artifact(name, runs).manifest()
        if manifest is None:
            continue
        cost = [clock(manifest["seconds"]), str(manifest["peak_memory_mib"])]
        known = [*recipe.kind(name).headlines, *_sources(recipe, name)]
        measured = [h for h in known if h.metric in manifest["after"]]
        own = _trained_on(recipe.stages[name])
        if told := evaluated.get((name, manifest["files"].get(WEIGHTS)), {}).get("text") if own else None:
            notes.append(f"{name}, by onebase eval: {told}")
        elif told := verdicts.of_itself(recipe.stages[name], manifest["before"], manifest["after"]):
            notes.append(f"{name}: {told} onebase eval compares its answers by what it was not trained on.")
        for headline in measured:
            table.add_row(name, headline.label, *_numbers(headline, manifest, headline.metric in own), *cost)
            name, cost = "", ["", ""]
        if not measured:
            table.add_row(name, "none (no data.test, no questions)", "", "", "", *cost)
    console.print(table)
    for note in notes:
        console.print(Text(note))


def show_answers(recipe: Recipe, runs: Path, console: Console) -> None:
    """A few held-out prompts, answered by the base and by each policy stage."""
    told: dict[str, dict[str, str]] = {}
    right: dict[str, str] = {}
    for name in recipe.order():
        file = recipe.artifact(name, runs).samples
        if recipe.artifact(name, runs).manifest() is None or not file.exists():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                sample = json.loads(line)
            except ValueError:
                continue
            question = _question(sample["prompt"])
            answers = told.setdefault(question, {"base": sample["base"]})
            answers[name] = sample["after"]
            if sample.get("answer"):
                right[question] = sample["answer"]
    complete = max((len(answers) for answers in told.values()), default=0)
    for question, answers in [item for item in told.items() if len(item[1]) == complete][:3]:
        hint = f"   (right: {right[question]})" if question in right else ""
        console.print(Text(f"\nQ: {question}", style="bold"), Text(hint, style="green"), end="\n")
        for name, answer in answers.items():
            console.print(Text(f"  {name:>9}  ", style="cyan") + Text(" ".join(answer.split())[:200] or "(nothing)"))


def show_evaluation(results: Json, console: Console) -> None:
    """One verdict a stage, and the numbers of every policy with their 95 % intervals."""
    colours = {"better": "green", "worse": "red", "warning": "yellow", "unshown": "yellow", "unclear": "dim"}
    for name, verdict in results["verdicts"].items():
        console.print(Text(f"{name:>9}  ", style="bold") + Text(verdict["text"], style=colours[verdict["word"]]))
    table = Table("number, 95 % interval", box=None, pad_edge=False)

    def cell(metric: Metric, found: Json | None) -> str:
        return metric.shown(found).replace(" (", "\n").removesuffix(")") if found else ""

    held = columns(results)
    for name in held:
        table.add_column(name, justify="right")
    for metric in (metric for metric in METRICS if any(metric.key in numbers for numbers in held.values())):
        found = [numbers.get(metric.key) for numbers in held.values()]
        table.add_row(metric.label, *(cell(metric, value) for value in found))
    for row in results["benchmarks"]:
        found = [row["numbers"].get(name.removesuffix(", zero-shot")) for name in held]
        table.add_row(of_benchmark(row).label, *(cell(of_benchmark(row), value) for value in found))
    console.print()
    console.print(table)


def show_next(recipe: Recipe, path: str, runs: Path, console: Console) -> None:
    """Where things are and what to type next."""
    console.print(f"\nAdapters, manifests, logs: {runs / recipe.name}/<stage>/", highlight=False, markup=False)
    last = recipe.order()[-1]
    change = {"dpo": "beta=0.3", "ppo": "kl_coef=0.2"}.get(recipe.stages[last].kind, "learning_rate=1e-5")
    console.print("What to type next:", highlight=False)
    for command, what in (
        (f"onebase status {path}", "where every stage stands"),
        (f"onebase eval {path}", "every stage against the one before, with intervals"),
        (f"onebase report {path}", "a page of it"),
        (f"onebase run {path}", "again: fresh stages are skipped"),
        (f"onebase run {path} -o stages.{last}.train.{change}", f"only {last} runs again"),
        ("onebase ls", "the other recipes; onebase cp NAME my.yaml to start your own"),
    ):
        console.print(f"  {command:<72} {what}", highlight=False, soft_wrap=True, markup=False)


def _sources(recipe: Recipe, name: str) -> list[Headline]:
    """What each source of a ppo stage's reward says by itself."""
    terms = recipe.stages[name].reward_terms()
    return [
        Headline(
            f"reward/{term.source}",
            f"{'sampled answers right' if term.truth else 'score'} by {term.source.rpartition('/')[2]}"
            f"{'' if term.weight else ', not paid'}",
            "higher",
            term.truth,
        )
        for term in terms
    ]


def _trained_on(section: StageSpec) -> list[str]:
    """The numbers that a stage was trained to raise, which therefore do not show that it is better."""
    paid = [f"reward/{term.source}" for term in section.reward_terms() if term.weight and not term.truth]
    return {"ppo": ["reward", *paid], "dpo": ["preference_accuracy"]}.get(section.kind, [])


def _numbers(headline: Headline, manifest: Json, own: bool) -> list[str]:
    before, after = manifest["before"].get(headline.metric), manifest["after"][headline.metric]
    if before is None:
        return ["", _number(after, headline), ""]
    change = after - before
    better = (change > 0) == (headline.better == "higher")
    arrow = f"{100 * change:+.1f} pts" if headline.percent else f"{change:+.3f}"
    low, high = (manifest["after"].get(f"{headline.metric}_gain_{end}") for end in ("low", "high"))
    if low is not None and high is not None and headline.percent:
        arrow += f" (95 %: {100 * low:+.1f} to {100 * high:+.1f})"
    elif low is not None and high is not None:
        arrow += f" (95 %: {low:+.3f} to {high:+.3f})"
    style = "dim" if change == 0 or (own and better) else "green" if better else "red"
    return [_number(before, headline), _number(after, headline), f"[{style}]{arrow}[/{style}]"]


def _number(value: float, headline: Headline) -> str:
    return f"{100 * value:.1f} %" if headline.percent else f"{value:.3f}"


def as_typed(path: str, overrides: Sequence[str], runs: Path) -> str:
    """A recipe with all that was said to it, for a command that is to mean the same run."""
    said = [word for override in overrides for word in ("-o", override)]
    return shlex.join([path, *said, *(() if runs == Path("runs") else ("--runs", str(runs)))])


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _question(prompt: list[dict[str, str]] | str) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
