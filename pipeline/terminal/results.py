"""What a run gained: each stage's numbers, what the policies answer, and their evaluation."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.atomic import Json
from pipeline.disk.manifest import Manifest
from pipeline.evaluate import people, preferred, verdicts
from pipeline.evaluate.stored import Results
from pipeline.label.rounds import measured, rounds
from pipeline.language.say import say
from pipeline.measure.metric import BY_NAME, METRICS, TRUTH, Estimate, Metric
from pipeline.recipe.recipe import Recipe
from pipeline.runs.told import asked, one_line, read_samples
from pipeline.stages import STAGES
from pipeline.stages.stage import StageSpec
from pipeline.terminal.console import Row, print_matrix, print_rows
from pipeline.terminal.machine import describe


def show_results(recipe: Recipe, runs: Path, console: Console) -> None:
    """The held-out numbers before and after every finished stage, with cost."""
    title = say("{name}: what each stage changed on held-out data (MiB: peak memory)", name=recipe.name)
    table = Table(title=title, box=None, pad_edge=False)
    for column in (say("stage"), say("number")):
        table.add_column(column, no_wrap=True)
    for column in (say("before"), say("after"), say("change"), say("time"), "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    evaluated, notes = verdicts.read(runs / recipe.name), list[str]()
    for name in recipe.order():
        manifest = recipe.artifact(name, runs).manifest()
        if manifest is None:
            continue
        cost = [clock(manifest.seconds), str(manifest.peak_memory_mib)]
        known = [*((metric, "") for metric in recipe.kind(name).headlines), *_sources(recipe, name)]
        measured = [(metric, note) for metric, note in known if metric.name in manifest.after]
        own = _trained_on(recipe.stages[name])
        if told := evaluated.get((name, manifest.files.get(WEIGHTS, ""))) if own else None:
            notes.append(say("{stage}, by onebase eval: {text}", stage=name, text=told.text))
        elif text := preferred.of_itself(recipe.stages[name], manifest.before, manifest.after):
            more = say("onebase eval compares its answers by what it was not trained on.")
            notes.append(say("{stage}: {text} {more}", stage=name, text=text, more=more))
        for metric, note in measured:
            table.add_row(name, metric.said, *_numbers(metric, manifest, metric.name in own), *cost)
            for below in filter(None, (note, _interval(metric, manifest))):
                table.add_row("", f"  {below}", "", "", "", "", "")
            name, cost = "", ["", ""]
        if not measured:
            why = say("none that these held-out rows show") if manifest.after else say("none: no held-out data")
            table.add_row(name, why, "", "", "", *cost)
    if not table.row_count:
        return
    console.print()
    print_rows(table, console, names=2)
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
        console.print()
        asked_for = Text(say("Q: {question}", question=one_line(question)), style="bold")
        hint = "   " + say("(right: {answer})", answer=right.get(question))
        if question in right:
            room = console.width - cell_len(asked_for.plain) - cell_len(hint)
            asked_for.append(hint if room >= 0 else f"\n{hint}", style="not bold green")
        console.print(asked_for)
        widest = max(map(len, answers))  # names are ASCII
        for name, answer in answers.items():
            label = Text(f"  {name:>{widest}}  ", style="cyan")
            said = Text(one_line(answer))
            said.truncate(max(1, console.width - len(label)), overflow="ellipsis")
            console.print(label + said)


def show_evaluation(results: Results, console: Console) -> None:
    """One verdict a stage, and the numbers of every policy with their 95 % intervals."""
    colours = {"better": "green", "worse": "red", "warning": "yellow", "unshown": "yellow", "unclear": "dim"}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")  # Chinese has no spaces to break at
    for name, verdict in verdicts.find(results).items():
        table.add_row(name, Text(verdict.text, style=colours[verdict.word]))
    console.print(table)

    def cell(metric: Metric, found: Estimate | None) -> str:
        return metric.lines(found) if found else ""

    held = results.columns()

    def label(metric: Metric) -> str:
        known = sorted({numbers[metric.name].n for numbers in held.values() if metric.name in numbers})
        return say("{label} (n {n})", label=metric.heading, n=" / ".join(map(str, known)))

    rows = [
        Row(label(metric), [cell(metric, numbers.get(metric.name)) for numbers in held.values()])
        for metric in METRICS
        if any(metric.name in numbers for numbers in held.values())
    ]
    for row in results.benchmarks:
        found = [row.numbers.get(name.removesuffix(", zero-shot")) for name in held]
        rows.append(Row(row.shown.heading, [cell(row.shown, value) for value in found]))
    console.print()
    print_matrix(say("number, 95 % interval"), list(held), rows, console)


def show_people(results: Results, console: Console) -> None:
    """The stages' ratings by people beside those by other judges."""
    if results.people is None:
        return
    console.print()
    columns, rows = people.ratings(results)
    title = say("ratings by people, beside those by other judges (Elo, 95 % interval)")
    table = Table(title=title, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column == columns[0] else "right")
    for cells in rows:
        table.add_row(*cells)
    if rows:
        print_rows(table, console)
    for told in people.tell(results):
        console.print(Text(told))


def show_forgetting(results: Results, console: Console) -> None:
    """What each policy has kept of every stage that it comes from."""
    if not results.forgetting:
        return
    title = say("forgetting: each stage against the earlier stage that had learnt it, row by row")
    table = Table(title=title, box=None, pad_edge=False)
    for column in (say("stage"), say("learnt by"), say("number")):
        table.add_column(column, no_wrap=True)
    for column in (say("then"), say("now"), say("change, 95 %")):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stages in results.forgetting.items():
        for earlier, numbers in stages.items():
            for number, kept in numbers.items():
                metric, change = BY_NAME[number], kept.change
                told = [metric.written(kept.before.value), metric.written(kept.after.value)]
                style = {"better": "green", "worse": "red"}.get(metric.word(change), "")
                table.add_row(name, earlier, metric.said, *told, Text(metric.shown(change, sign=True), style=style))
    console.print()
    print_rows(table, console, names=3)


def show_rounds(recipe: Recipe, results: Results, console: Console) -> None:
    """What each round of labels has brought."""
    if found := rounds(recipe, results):
        rows = [Row(say("labels"), [str(one.labels) for one in found])]
        for metric in measured(found):
            known = [one.numbers.get(metric.name) for one in found]
            rows.append(Row(metric.heading, [metric.lines(number) if number else "" for number in known]))
        console.print()
        print_matrix(say("round"), [one.heading for one in found], rows, console)


def results_as_json(results: Results) -> Json:
    """What results.json holds, and what its numbers are."""
    metrics = [*METRICS, *(row.shown for row in results.benchmarks)]
    return {"results": results.sealed(), "metrics": describe(metrics)}


def metrics_of(recipe: Recipe, name: str) -> list[Metric]:
    """The numbers that a stage takes of itself."""
    return [*recipe.kind(name).headlines, *(metric for metric, _ in _sources(recipe, name))]


def _sources(recipe: Recipe, name: str) -> list[tuple[Metric, str]]:
    """What each source of a ppo stage's reward says by itself, with a note; nothing of the only one that is paid, whose
    score is the reward."""
    terms = recipe.stages[name].reward_terms()
    paid = [term for term in terms if term.weight]
    return [
        (
            Metric(f"reward/{term.source}", TRUTH.label if term.truth else "score", unit="%" if term.truth else ""),
            _by(term.source.rpartition("/")[2], bool(term.weight)),
        )
        for term in terms
        if paid != [term] or term.weight != 1 or term.truth
    ]


def _by(source: str, paid: bool) -> str:
    return say("by {source}", source=source) if paid else say("by {source}, not paid", source=source)


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
    return say("95 %: {interval}", interval=interval) if interval else ""


def as_typed(path: str, overrides: Sequence[str], runs: Path) -> str:
    """A recipe with all that was said to it, for a command that is to mean the same run."""
    said = [word for override in overrides for word in ("-o", override)]
    return shlex.join([path, *said, *(() if runs == Path("runs") else ("--runs", str(runs)))])


def clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
