"""What a run gained: each stage's numbers, what the policies answer, their evaluation; and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.manifest import Manifest
from pipeline.evaluate import verdicts
from pipeline.evaluate.stored import Results, read_verdicts
from pipeline.measure.metric import METRICS, TRUTH, Estimate, Metric
from pipeline.recipe.recipe import Recipe
from pipeline.runs.told import asked, one_line, read_samples, shorten
from pipeline.stages import STAGES
from pipeline.stages.stage import StageSpec


def show_results(recipe: Recipe, runs: Path, console: Console) -> None:
    """The held-out numbers before and after every finished stage, with cost."""
    title = f"{recipe.name}: what each stage changed on held-out data (MiB: peak memory)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "number"):
        table.add_column(column, no_wrap=True)
    for column in ("before", "after", "change", "time", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    evaluated, notes = read_verdicts(runs / recipe.name), list[str]()
    for name in recipe.order():
        manifest = recipe.artifact(name, runs).manifest()
        if manifest is None:
            continue
        cost = [clock(manifest.seconds), str(manifest.peak_memory_mib)]
        known = [*((metric, "") for metric in recipe.kind(name).headlines), *_sources(recipe, name)]
        measured = [(metric, note) for metric, note in known if metric.name in manifest.after]
        own = _trained_on(recipe.stages[name])
        if told := evaluated.get((name, manifest.files.get(WEIGHTS, ""))) if own else None:
            notes.append(f"{name}, by onebase eval: {told.text}")
        elif text := verdicts.of_itself(recipe.stages[name], manifest.before, manifest.after):
            notes.append(f"{name}: {text} onebase eval compares its answers by what it was not trained on.")
        for metric, note in measured:
            table.add_row(name, metric.label, *_numbers(metric, manifest, metric.name in own), *cost)
            for below in filter(None, (note, _interval(metric, manifest))):
                table.add_row("", f"  {below}")
            name, cost = "", ["", ""]
        if not measured:
            table.add_row(name, "none: no held-out data", "", "", "", *cost)
    console.print(table)
    for note in notes:
        console.print(Text(note))


def show_answers(recipe: Recipe, runs: Path, console: Console) -> None:
    """A few held-out prompts, answered by the base and by each policy stage."""
    told: dict[str, dict[str, str]] = {}
    right: dict[str, str] = {}
    for name in recipe.order():
        out = recipe.artifact(name, runs)
        for sample in read_samples(out) if out.manifest() else []:
            question = asked(sample)
            answers = told.setdefault(question, {"base": sample["base"]})
            answers[name] = sample["after"]
            if sample.get("answer"):
                right[question] = sample["answer"]
    complete = max((len(answers) for answers in told.values()), default=0)
    for question, answers in [item for item in told.items() if len(item[1]) == complete][:3]:
        hint = f"   (right: {right[question]})" if question in right else ""
        console.print()
        room = console.width - len("Q: ") - len(hint)
        console.print(Text(f"Q: {shorten(question, room)}", style="bold") + Text(hint, style="not bold green"))
        for name, answer in answers.items():
            who = f"  {name:>9}  "
            console.print(Text(who, style="cyan") + Text(shorten(one_line(answer), console.width - len(who))))


def show_evaluation(results: Results, console: Console) -> None:
    """One verdict a stage, and the numbers of every policy with their 95 % intervals."""
    colours = {"better": "green", "worse": "red", "warning": "yellow", "unshown": "yellow", "unclear": "dim"}
    for name, verdict in results.verdicts.items():
        console.print(Text(f"{name:>9}  ", style="bold") + Text(verdict.text, style=colours[verdict.word]))
    table = Table("number, 95 % interval", box=None, pad_edge=False)

    def cell(metric: Metric, found: Estimate | None) -> str:
        return "\n".join(filter(None, (metric.written(found.value), metric.range(found)))) if found else ""

    held = results.columns()
    for name in held:
        table.add_column(name, justify="right")
    for metric in (metric for metric in METRICS if any(metric.name in numbers for numbers in held.values())):
        table.add_row(metric.heading, *(cell(metric, numbers.get(metric.name)) for numbers in held.values()))
    for row in results.benchmarks:
        found = [row.numbers.get(name.removesuffix(", zero-shot")) for name in held]
        table.add_row(row.shown.heading, *(cell(row.shown, value) for value in found))
    console.print()
    console.print(table)


def show_next(recipe: Recipe, path: str, runs: Path, console: Console) -> None:
    """Where things are and what to type next."""
    print_line = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    print_line(f"\nAdapters, manifests, logs: {runs / recipe.name}/<stage>/")
    print_line("What to type next:")
    talk = [("talk to it", f"onebase chat {shlex.quote(str(runs / recipe.name))}")]
    for what, command in (
        *(talk if any(recipe.kind(name).answers for name in recipe.order()) else []),
        ("compare stages", f"onebase eval {path}"),
        ("see where it is", f"onebase status {path}"),
        ("make your own", f"onebase cp {shlex.split(path)[0]} my.yaml"),
    ):
        print_line(f"  {what:<17}{command}")


def _sources(recipe: Recipe, name: str) -> list[tuple[Metric, str]]:
    """What each source of a ppo stage's reward says by itself, with a note; nothing of the only one that is paid, whose
    score is the reward."""
    terms = recipe.stages[name].reward_terms()
    paid = [term for term in terms if term.weight]
    return [
        (
            Metric(f"reward/{term.source}", TRUTH.label if term.truth else "score", unit="%" if term.truth else ""),
            f"by {term.source.rpartition('/')[2]}{'' if term.weight else ', not paid'}",
        )
        for term in terms
        if paid != [term] or term.weight != 1 or term.truth
    ]


def _trained_on(section: StageSpec) -> list[str]:
    """The numbers that a stage was trained to raise, which therefore do not show that it is better."""
    raised = STAGES[section.kind].raised
    paid = [f"reward/{term.source}" for term in section.reward_terms() if term.weight and not term.truth]
    return [raised.name, *paid] if raised else []


def _numbers(metric: Metric, manifest: Manifest, own: bool) -> list[str]:
    before, after = manifest.before.get(metric.name), manifest.after[metric.name]
    if before is None:
        return ["", metric.written(after, fine=True), ""]
    gain = Estimate.among(manifest.after, f"{metric.name}_gain")
    change = gain.value if gain else after - before  # a gain is of the same rows on both sides
    better = (change > 0) == (metric.direction == "higher")
    told = metric.written(change, sign=True, fine=True)
    style = "dim" if change == 0 or (own and better) else "green" if better else "red"
    return [*(metric.written(value, fine=True) for value in (before, after)), f"[{style}]{told}[/{style}]"]


def _interval(metric: Metric, manifest: Manifest) -> str:
    """Of the change, where the stage has measured it."""
    gain = Estimate.among(manifest.after, f"{metric.name}_gain")
    interval = metric.range(gain, sign=True, fine=True) if gain else ""
    return f"95 %: {interval}" if interval else ""


def as_typed(path: str, overrides: Sequence[str], runs: Path) -> str:
    """A recipe with all that was said to it, for a command that is to mean the same run."""
    said = [word for override in overrides for word in ("-o", override)]
    return shlex.join([path, *said, *(() if runs == Path("runs") else ("--runs", str(runs)))])


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
