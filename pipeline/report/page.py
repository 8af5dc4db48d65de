"""One page of a run, as HTML that needs nothing else and as Markdown beside its pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from pipeline.data.examine import read_kept
from pipeline.disk import metrics
from pipeline.disk.atomic import Json, write_text
from pipeline.disk.manifest import Manifest, Table
from pipeline.errors import UserError
from pipeline.evaluate import verdicts
from pipeline.evaluate.plan import plan
from pipeline.evaluate.stored import Link, Results, Sample, folder, read_fresh, read_results
from pipeline.measure.metric import (
    BY_NAME,
    CORPUS_LOSS,
    DIALOGUE_LOSS,
    ELO,
    METRICS,
    QUESTION_ACCURACY,
    SHARE,
    TRUTH,
    Estimate,
    Metric,
)
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe
from pipeline.report import figures, lineage
from pipeline.stages import STAGES
from pipeline.terminal.results import as_typed, clock

SHOWN_AT_ONCE = 6


def write(
    recipe: Recipe, path: str, runs: Path, made: datetime | None = None, overrides: Sequence[str] = ()
) -> list[Path]:
    """Write report.html and report.md below runs/<recipe>/report/ and return their paths.

    path, overrides: the recipe as the person named it, for the commands.  made: the date on the page; now unless given.
    Raises UserError if nothing has finished, or if the evaluation is older than the run.
    """
    target = runs / recipe.name / "report"
    context = contents(recipe, as_typed(path, overrides, runs), runs)
    context["made"] = (made or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    for name, picture in context["pictures"].items():
        write_text(target / "pictures" / _file(name), _stand_alone(picture))
    written = []
    for template, name in (("page.html.jinja", "report.html"), ("page.md.jinja", "report.md")):
        text = _templates().get_template(template).render(context)
        write_text(target / name, text)
        written.append(target / name)
    return written


def contents(recipe: Recipe, typed: str, runs: Path) -> Json:
    """Everything the templates show, without a date. `typed`: what names the run in a command."""
    manifests = {name: recipe.artifact(name, runs).manifest() for name in recipe.order()}
    finished: dict[str, Manifest] = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    if not finished:
        raise UserError(f"no stage of {recipe.name} has finished below {runs / recipe.name}. Run it first.")
    results = _evaluated(recipe, typed, runs)
    kinds = {name: recipe.stages[name].kind for name in finished}
    base = Path(recipe.spec.model.base).name
    colours = {name: recipe.kind(name).colour for name in finished}
    examined = _examined(recipe, runs, finished)
    pictures = _pictures(recipe, runs, results, colours)
    if examined:
        pictures["row-lengths"] = figures.row_lengths(examined, colours)
    costs = [_cost(name, manifest, recipe, runs) for name, manifest in finished.items()]
    chain = results.chain if results else [Link.of(recipe, name) for name in finished]
    return {
        "recipe": recipe,
        "base": base,
        "stages": list(finished),
        "kinds": kinds,
        "missing": [name for name, manifest in manifests.items() if manifest is None],
        "results": results,
        "columns": results.columns() if results else {},
        "metrics": METRICS,
        "by_name": BY_NAME,
        "share": SHARE,
        "elo": ELO,
        "pictures": {"lineage": lineage.drawn(chain, _notes(results), base, colours)} | pictures,
        "training": [name for name in pictures if name.startswith(("training-", "path-"))],
        "before_after": _before_after(recipe, finished),
        "of_itself": _of_itself(recipe, finished),
        "costs": costs,
        "tables": _tables(recipe, finished, bool(results)),
        "energy": next((row["energy_of"] for row in costs if row["energy"] is not None), None),
        "data": [
            {"stage": name, **source.as_json()}
            for name, manifest in finished.items()
            for source in manifest.data.sources
        ],
        "examined": [(name, warning) for name, stage in examined.items() for warning in stage["warnings"]],
        "versions": next(iter(reversed(finished.values()))).versions,
        "device": next(iter(reversed(finished.values()))).device,
        "resolved": yaml.dump(recipe.tree),
        "samples": _samples(results),
        "shown_at_once": SHOWN_AT_ONCE,
        "typed": typed,
    }


def _examined(recipe: Recipe, runs: Path, finished: dict[str, Manifest]) -> Json:
    """What `onebase data` found of the very files that the finished stages were trained and measured on."""
    found = read_kept(runs / recipe.name)
    files = {name: manifest.data_hashes for name, manifest in finished.items()}
    return {name: found[name] for name in finished if name in found and found[name].get("files") == files[name]}


def _evaluated(recipe: Recipe, typed: str, runs: Path) -> Results | None:
    """The evaluation's results; None where there are none. Raises UserError if they are of an older run."""
    where = folder(recipe, runs)
    results = read_results(where)
    if results is None:
        return None
    wanted = plan(recipe, runs)
    old = [
        measure.file
        for measure in wanted
        if results.made_of.get(measure.file) != measure.fingerprint or read_fresh(measure, where) is None
    ]
    if old:
        raise UserError(
            f"the evaluation in {where} is damaged or older than the run ({len(old)} of {len(wanted)} measures, first "
            f"{old[0]}). "
            f"Evaluate again first: onebase eval {typed}"
        )
    return results


def _pictures(recipe: Recipe, runs: Path, results: Results | None, colours: dict[str, str]) -> dict[str, str]:
    logged = {name: metrics.read(recipe.artifact(name, runs).metrics) for name in colours}
    found = {f"training-{name}": figures.training(name, rows, colours[name]) for name, rows in logged.items()}
    found |= {f"path-{name}": figures.path(name, rows, colours[name]) for name, rows in logged.items()}
    if results:
        for name, model in results.reward_models.items():
            found[f"calibration-{name}"] = figures.reliability(model.reliability, model.ece, colours[name])
            found[f"scores-{name}"] = figures.scores(**model.scores)
        for judge, arena in results.arenas.items():
            found[f"elo-{judge}"] = figures.elo(arena, f"By {judge_name(judge)}", colours)
        if curve := results.best_of_n:
            steps = results.steps
            # On one axis with it only what went from where it is drawn
            started = [name for name, parent in results.parents.items() if parent == curve.policy]
            trained = {name: results.numbers[name] for name in started if "kl" in results.numbers[name]}
            found["reward-kl"] = figures.overoptimisation(curve, trained, steps, "reward", "reward", colours)
            if any(point.gold for point in curve.points):
                found["truth-kl"] = figures.overoptimisation(curve, trained, steps, "truth", "share right", colours)
            found["samples-needed"] = figures.samples_needed(curve)
        if results.lengths:
            found["lengths"] = figures.lengths(results.lengths, colours)
    return {name: picture for name, picture in found.items() if picture}


def judge_name(judge: str) -> str:
    return {"truth": "the checked truth", "judge": "the external judge"}.get(judge, f"the score of '{judge}'")


def word_shown(word: str) -> str:
    """A verdict's word as a reader sees it."""
    return {"unclear": "no clear change", "unshown": "not shown to be better"}.get(word, word)


def _notes(results: Results | None) -> dict[str, str]:
    """A number under each stage of the lineage."""
    notes: dict[str, str] = {}
    for stage in results.chain if results else []:
        name, kind = stage.name, STAGES[stage.kind]
        if not kind.answers:
            headline = kind.headlines[0]
            if headline.name in stage.after:
                notes[name] = f"{headline.name.replace('_', ' ')} {headline.written(stage.after[headline.name])}"
            continue
        numbers = results.numbers[name] if results else {}
        # The same for every policy that is asked things, or they would seem to differ.
        asked = [QUESTION_ACCURACY, TRUTH, DIALOGUE_LOSS]
        asked = [CORPUS_LOSS, *asked] if kind.every_token else asked
        metric = next((metric for metric in asked if metric.name in numbers), None)
        if metric:
            value = metric.written(numbers[metric.name].value)
            told = {QUESTION_ACCURACY: f"{value} of questions right", TRUTH: f"{value} sampled right"}
            notes[name] = told.get(metric, f"{metric.label} {value}")
    return notes


def _before_after(recipe: Recipe, finished: dict[str, Manifest]) -> list[Json]:
    """The numbers every stage takes of itself, for a run that has not been evaluated."""
    rows = []
    for name, manifest in finished.items():
        for headline in recipe.kind(name).headlines:
            if headline.name in manifest.after:
                before = manifest.before.get(headline.name)
                rows.append(
                    {
                        "stage": name,
                        "label": headline.label,
                        "before": "" if before is None else headline.written(before, fine=True),
                        "after": _with_range(headline, manifest.after),
                    }
                )
    return rows


def _tables(recipe: Recipe, finished: dict[str, Manifest], evaluated: bool) -> list[tuple[str, Table]]:
    """What stages tell of their held-out rows. Of an evaluated run also the numbers of a stage that no measure is taken
    of, as it answers nothing and ranks nothing."""
    tables: list[tuple[str, Table]] = []
    for name, manifest in finished.items():
        kind = recipe.kind(name)
        rows = [
            [row["label"], row["before"], row["after"]] for row in _before_after(recipe, {name: manifest}) if evaluated
        ]
        if rows and not kind.answers and not kind.ranks:
            tables.append((name, Table(title="numbers", columns=["held out", "before", "after"], rows=rows)))
        tables += [(name, table) for table in manifest.tables]
    return tables


def _with_range(metric: Metric, numbers: Mapping[str, float]) -> str:
    """A stage's own number, with its interval where the stage measured one."""
    found = Estimate.among(numbers, metric.name)
    interval = metric.range(found, fine=True) if found else ""
    return metric.written(numbers[metric.name], fine=True) + (f" ({interval})" if interval else "")


def _of_itself(recipe: Recipe, finished: dict[str, Manifest]) -> dict[str, str]:
    """What the stages' own numbers show of those that were trained on preferences."""
    told = {
        name: verdicts.of_itself(recipe.stages[name], manifest.before, manifest.after)
        for name, manifest in finished.items()
    }
    return {name: text for name, text in told.items() if text}


def _cost(name: str, manifest: Manifest, recipe: Recipe, runs: Path) -> Json:
    counts = manifest.data.counts
    tokens = max((row.get("num_tokens", 0) for row in metrics.read(recipe.artifact(name, runs).metrics)), default=0)
    seconds = counts.get("train_seconds")
    return {
        "stage": name,
        "seconds": manifest.seconds,
        "train_seconds": seconds,
        "steps": counts.get("steps"),
        "tokens": int(tokens),
        "speed": round(tokens / seconds) if seconds and tokens else None,
        "energy": manifest.energy_wh,
        "energy_of": manifest.energy_of,
        "peak": manifest.peak_memory_mib,
        "peak_is": manifest.peak_memory_is,
    }


def _samples(results: Results | None) -> list[tuple[str, Sample]]:
    """Answers side by side, first those on which the policies differ most in being right."""
    samples = results.samples if results else []

    def differ(sample: Sample) -> int:
        return -len({said.right for said in list(sample.told.values())[1:]})

    return [(_question(sample.prompt), sample) for sample in sorted(samples, key=differ)]


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _file(picture: str) -> str:
    """A picture's file; a judge may be a function, named by its path."""
    return re.sub(r"[^\w.-]+", "-", picture) + ".svg"


def _stand_alone(picture: str) -> str:
    """An SVG file, on white: a Markdown viewer may have a dark page."""
    start = '<?xml version="1.0" encoding="utf-8"?>\n'
    return start + picture.replace("<svg ", '<svg style="background: white" ', 1) + "\n"


def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.report", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["clock"] = clock
    found.filters["file"] = _file
    found.filters["thousands"] = lambda value: f"{value:,}".replace(",", "\u202f")
    found.globals |= {"judge_name": judge_name, "word_shown": word_shown}
    return found
