"""One page of a run, as HTML that needs nothing else and as Markdown beside its pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from pipeline.data.examine import read_kept
from pipeline.disk import metrics
from pipeline.disk.atomic import Json, write_text
from pipeline.disk.manifest import Manifest
from pipeline.errors import UserError
from pipeline.evaluate import people, verdicts
from pipeline.evaluate.plan import plan
from pipeline.evaluate.stored import Link, Results, Sample, folder, read_fresh, read_results
from pipeline.label import agreement
from pipeline.label.rounds import measured, rounds
from pipeline.language.say import say, say_again, spoken, translated
from pipeline.measure.metric import BY_NAME, ELO, METRICS, SHARE
from pipeline.recipe import yaml
from pipeline.recipe.recipe import Recipe
from pipeline.report import figures, lineage, opening, own, sentences
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
    day = (made or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    context["summary"] = sentences.of_the_run(recipe, context["base"], len(context["stages"]), context["missing"], day)
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
    base = Path(recipe.spec.model.base).name
    colours = {name: recipe.kind(name).colour for name in finished}
    examined = _examined(recipe, runs, finished)
    pictures = _pictures(recipe, runs, results, colours)
    found_rounds = rounds(recipe, results)
    for metric in measured(found_rounds):
        if picture := figures.rounds(found_rounds, metric):
            pictures[f"rounds-{metric.name}"] = picture
    if examined:
        pictures["row-lengths"] = figures.row_lengths(examined, colours)
    costs = [own.cost(name, manifest, recipe, runs) for name, manifest in finished.items()]
    device = next(reversed(finished.values())).device
    chain = results.chain if results else [Link.of(recipe, name) for name in finished]
    found = verdicts.find(results) if results else {}
    if results:
        heading, lead = opening.best(results, found)
        changes = opening.changes(results, colours)
    else:
        heading, lead = say("{name}: what each stage changed", name=recipe.name), ""
        changes = []
    changes = changes or opening.own_changes(recipe, finished, colours)
    caption = opening.caption(changes)
    opened = {"changes": opening.drawn(changes, caption)} if changes else {}
    notes = sentences.under_each_stage(results)
    opened["lineage"] = lineage.drawn(chain, notes, base, colours)
    return {
        "language": {"en": "en", "zh": "zh-Hans"}[spoken()],
        "heading": heading,
        "lead": lead,
        "caption": caption,
        "verdicts": found,
        "recipe": recipe,
        "base": base,
        "stages": list(finished),
        "missing": [name for name, manifest in manifests.items() if manifest is None],
        "results": results,
        "columns": results.columns() if results else {},
        "metrics": METRICS,
        "by_name": BY_NAME,
        "share": SHARE,
        "elo": ELO,
        "pictures": opened | pictures,
        "ratings": people.ratings(results) if results and results.people and results.people.votes else None,
        "of_people": people.tell(results) if results else [],
        "training": [name for name in pictures if name.startswith(("training-", "path-"))],
        "before_after": own.before_after(recipe, finished),
        "of_itself": own.of_itself(recipe, finished),
        "costs": costs,
        "tables": own.tables(recipe, finished, bool(results)),
        "energy": any(row["energy"] is not None for row in costs),
        "cost_note": sentences.of_the_cost(costs, device),
        "flagged": sentences.of_over_optimisation(results.over_optimised) if results else "",
        "gained": sentences.of_best_of_n(results.best_of_n) if results and results.best_of_n else "",
        "data": [
            {"stage": name, **source.as_json()}
            for name, manifest in finished.items()
            for source in manifest.data.sources
        ],
        "labelled": [(name, agreement.tell(stage["votes"])) for name, stage in examined.items() if "votes" in stage],
        "examined": [(name, warning) for name, stage in examined.items() for warning in stage["warnings"]],
        "versions": next(iter(reversed(finished.values()))).versions,
        "resolved": yaml.dump(recipe.tree),
        "samples": _samples(results),
        "shown_at_once": SHOWN_AT_ONCE,
        "typed": typed,
        "rounds": found_rounds,
        "of_rounds": measured(found_rounds),
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
    if results.made_of.get(people.MADE_OF, "") != people.fingerprint(people.read_arena(people.arena_of(recipe))[0]):
        raise UserError(
            f"{people.arena_of(recipe)} holds other votes than the evaluation has counted. Evaluate again first: "
            f"onebase eval {typed}"
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
        for judge, arena in ((judge, arena) for judge, arena in results.arenas.items() if arena.elo):
            found[f"elo-{judge}"] = figures.elo(arena, say("By {judge}", judge=sentences.judge_name(judge)), colours)
        if curve := results.best_of_n:
            steps = results.steps
            # On one axis with it only what went from where it is drawn
            started = [name for name, parent in results.parents.items() if parent == curve.policy]
            trained = {name: results.numbers[name] for name in started if "kl" in results.numbers[name]}
            found["reward-kl"] = figures.overoptimisation(curve, trained, steps, "reward", say("reward"), colours)
            if any(point.gold for point in curve.points):
                found["truth-kl"] = figures.overoptimisation(
                    curve, trained, steps, "truth", say("share right"), colours
                )
            found["samples-needed"] = figures.samples_needed(curve)
        if results.lengths:
            found["lengths"] = figures.lengths(results.lengths, colours)
    return {name: picture for name, picture in found.items() if picture}


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
    """An SVG file, on white and in its own colours: a Markdown viewer may have a dark page, and knows none of ours."""
    start = '<?xml version="1.0" encoding="utf-8"?>\n'
    picture = re.sub(r"var\(--[a-z]+, (#[0-9a-f]+)\)", r"\1", picture)
    return start + picture.replace("<svg ", '<svg style="background: white" ', 1) + "\n"


@jinja2.pass_eval_context
def _say(context: jinja2.nodes.EvalContext, english: str, **values: object) -> str:
    """say() of a template. In HTML its values are text, unless they are markup already."""
    if not context.autoescape:
        return say(english, **values)
    return Markup(escape(translated(english)).format(**values))


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
    found.filters["say_again"] = say_again
    found.globals |= {"say": _say, "say_again": say_again}
    found.globals |= {"judge_name": sentences.judge_name, "word_shown": opening.word_shown}
    found.globals |= {"of_the_picture": sentences.of_the_picture}
    found.globals |= {"of_the_judge": sentences.of_the_judge, "of_the_rounds": sentences.of_the_rounds}
    return found
