"""The commands. Nothing here imports torch: the command line answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.bring import commands as bringing
from pipeline.errors import UserError
from pipeline.language.say import say
from pipeline.publish import commands as publishing
from pipeline.terminal import help, labelling, votes
from pipeline.terminal.help import command
from pipeline.terminal.machine import print_json, stdout_kept
from pipeline.terminal.options import AsJson, Lang, Overrides, RecipePath, RunFolder, Runs

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe

app = typer.Typer(
    cls=help.Group,
    help="Train a language model in stages, each a small adapter on one frozen 4-bit base. One recipe names them all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=help.print_version, is_eager=True)] = False,
) -> None:
    pass


bringing.add_to(app)
publishing.add_to(app)
labelling.add_to(app)
votes.add_to(app)


@command(app, "ls", "onebase ls")
def ls() -> None:
    """List the recipes that come with OneBase."""
    from pipeline.terminal.recipes import show_recipes

    show_recipes()


@command(app, "cp", "onebase cp quickstart my.yaml")
def cp(
    name: RecipePath,
    to: Annotated[Path, typer.Argument(metavar="TO", help="The file or folder to write it to.")],
) -> None:
    """Copy a recipe to make it your own."""
    from pipeline.terminal.recipes import copy_recipe

    copy_recipe(name, to)


@command(app, "check", "onebase check my.yaml")
def check(recipe: RecipePath, override: Overrides = [], as_json: AsJson = False, lang: Lang = "en") -> None:
    """Check a recipe, its data and its settings. Trains nothing."""
    from pipeline.stages.check import (
        check_arguments,
        check_base,
        check_engines,
        check_liger,
        check_rendering,
        check_trackers,
    )
    from pipeline.terminal.states import count_rows, show_rows, show_sound, show_waiting

    with stdout_kept(as_json):
        chain = _read(recipe, override)
        counts, rows, refused = count_rows(chain)
        show_rows(chain, counts, refused)
        show_waiting(chain)
        chain.parts()
        check_base(chain.spec.model, chain.stages)
        check_trackers(chain.stages)
        check_engines(chain.spec.model, chain.stages)
        check_liger(chain.spec.model, chain.stages)
        check_arguments(chain.spec.model, chain.stages, chain.spec.seed)
        untried = check_rendering(chain.spec.model, {name: chain.stages[name] for name in rows}, rows)
        show_sound(recipe, chain.order(), untried)
    if as_json:
        print_json({"recipe": chain.name, "stages": counts, "not_tried": untried})


@command(app, "data", "onebase data my.yaml sft --show 3")
def data(
    recipe: RecipePath,
    stage: Annotated[list[str] | None, typer.Argument(metavar="STAGE", help="Only these stages; else all.")] = None,
    override: Overrides = [],
    show: Annotated[int, typer.Option(metavar="N", min=0, help="Print N rows as the model will see them.")] = 0,
    as_json: AsJson = False,
    runs: Runs = Path("runs"),
    lang: Lang = "en",
) -> None:
    """Examine the data: lengths, loss masks, duplicates, overlaps.

    It loads no weights. It examines every stage, even if one has faults. The exit status is 2 if a run would stop.
    """
    from pipeline.recipe.waiting import waiting
    from pipeline.terminal.console import make_console
    from pipeline.terminal.data import show_examination, show_rows
    from pipeline.terminal.states import show_waiting

    chain = _read(recipe, override)
    lacking = waiting(chain)
    names = [name for name in chain.named(stage or chain.order()) if name not in lacking]
    if not as_json:
        show_waiting(chain)
    if show:
        faults = [fault for name in names for fault in show_rows(chain, name, show, make_console())]
    else:
        faults = show_examination(chain, names, runs, as_json, make_console())
    if faults:
        raise UserError("faults in the data, listed above: a run would stop there")


@command(app, "plan", "onebase plan my.yaml --gpu rtx3060")
def plan(
    recipe: RecipePath,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    gpu: Annotated[
        str, typer.Option(metavar="CARD", help="Plan for this card (rtx3060, a100-40gb) or memory (12GB).")
    ] = "",
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Show what a run would do and why, its memory and its time."""
    from pipeline.plan import cards
    from pipeline.terminal.console import make_console
    from pipeline.terminal.plan import plan_as_json, show_plan

    with stdout_kept(as_json):
        chain, card = _read(recipe, override), cards.find_card(gpu) if gpu else cards.detect_card()
        if not as_json:
            return show_plan(chain, runs, card, make_console())
        found = plan_as_json(chain, runs, card)
    print_json(found)


@command(app, "run", "onebase run my.yaml -o stages.dpo.train.beta=0.05")
def run(
    recipe: RecipePath,
    override: Overrides = [],
    only: Annotated[list[str], typer.Option(metavar="STAGE", help="Only this stage. May be given several times.")] = [],
    from_: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="This stage and all that continue from it.")
    ] = "",
    runs: Runs = Path("runs"),
    launch_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An accelerate config, for several GPUs.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on even if a stage misses its `expect:`.")] = False,
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Train the stages that are not up to date.

    Each stage runs in a process of its own. A run that was stopped goes on where it stopped.
    """
    from pipeline.report.ending import write_if_possible
    from pipeline.runs import runner
    from pipeline.terminal.ending import show_ending, tell_stopped, tell_waiting
    from pipeline.terminal.results import as_typed
    from pipeline.terminal.states import states_as_json

    if launch_config and not os.path.isfile(launch_config):
        raise UserError(f"--launch-config: no such file: {launch_config}")
    chain = _read(recipe, override)
    with stdout_kept(as_json):
        try:
            done = runner.run(chain, only, from_ or None, runs, launch_config, force)
        except KeyboardInterrupt:
            tell_stopped(chain, runs, " ".join(sys.argv[1:]))
            raise SystemExit(130) from None
        if done:
            show_ending(chain, recipe, override, runs, write_if_possible(chain, recipe, runs, override))
        if not tell_waiting(chain, as_typed(recipe, override, runs)) and not done:
            print(say("Nothing to do: everything asked for is fresh."))
    if as_json:
        print_json({"ran": done, **states_as_json(chain, runs)})


@command(app, "status", "onebase status my.yaml")
def status(
    recipe: RecipePath,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Show where every stage stands and what it gained."""
    from pipeline.runs.states import standing
    from pipeline.terminal.console import make_console
    from pipeline.terminal.ending import tell_waiting
    from pipeline.terminal.results import as_typed, show_answers, show_results
    from pipeline.terminal.states import show_states, states_as_json

    chain, console = _read(recipe, override), make_console()
    if as_json:
        return print_json(states_as_json(chain, runs))
    show_states(standing(chain, runs), console)
    show_results(chain, runs, console)
    show_answers(chain, runs, console)
    tell_waiting(chain, as_typed(recipe, override, runs))


@command(app, "eval", "onebase eval my.yaml")
def evaluate(
    recipe: RecipePath,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    judge: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="URL MODEL", help="An OpenAI-compatible server on this machine that compares answers."),
    ] = None,
    lm_eval: Annotated[
        str,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-eval as well: names or files, with commas."),
    ] = "",
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Measure every finished stage on held-out data.

    Each stage is compared with the one it continues. Every number has a 95 % interval.
    """
    from pipeline.evaluate.evaluation import launch
    from pipeline.evaluate.forgetting import flat
    from pipeline.recipe.gates import hold_measured
    from pipeline.terminal.console import make_console
    from pipeline.terminal.results import (
        as_typed,
        results_as_json,
        show_evaluation,
        show_forgetting,
        show_people,
        show_rounds,
    )

    tasks = [task for task in lm_eval.split(",") if task]
    with stdout_kept(as_json):
        try:
            read = _read(recipe, override)
            results = launch(read, runs, judge, tasks)
        except KeyboardInterrupt:
            print(say("stopped. What has been measured is kept. To go on, type the same again."), file=sys.stderr)
            raise SystemExit(130) from None
    if as_json:
        print_json(results_as_json(results))
    else:
        show_evaluation(results, make_console())
        show_people(results, make_console())
        show_forgetting(results, make_console())
        show_rounds(read, results, make_console())
        print("\n" + say("To make a page of it: onebase report {words}", words=as_typed(recipe, override, runs)))
    hold_measured(read.spec.expect, {link.name: flat(results.forgetting.get(link.name, {})) for link in results.chain})


@command(app, "report", "onebase report my.yaml")
def report(recipe: RecipePath, override: Overrides = [], runs: Runs = Path("runs"), lang: Lang = "en") -> None:
    """Write one page about a run: verdicts, numbers, curves, cost.

    The page is written as one HTML file that needs no network, and as Markdown.
    """
    from pipeline.report.page import write

    for path in write(_read(recipe, override), recipe, runs, overrides=override):
        print(path)


@command(app, "chat", "onebase chat runs/quickstart --compare sft dpo")
def chat(
    run: RunFolder,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="A stage that answers, or base. Without it, the last such stage.")
    ] = "",
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="STAGE STAGE", help="Two stages answer side by side.")
    ] = None,
    save_to: Annotated[Path, typer.Option(metavar="FILE", help="Where /save keeps corrected answers.")] = Path(
        "corrections.jsonl"
    ),
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 always takes the most likely token.")] = 0.0,
) -> None:
    """Talk to a finished stage."""
    from pipeline.terminal.chat import open_chat, talk

    if stage and compare:
        raise UserError("name either one STAGE or two with --compare")
    talk(open_chat(run, list(compare or filter(None, [stage])), save_to, new_tokens, temperature))


@command(app, "compare", "onebase compare runs/quickstart runs/mine")
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's folder (runs/quickstart).")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The folder of the other run.")],
    as_json: AsJson = False,
    lang: Lang = "en",
) -> None:
    """Show how two runs differ: recipe, data, numbers."""
    from pipeline.terminal import compare as comparing
    from pipeline.terminal.console import make_console

    found = comparing.compare(run_a, run_b)
    if as_json:
        return print_json(found)
    comparing.show(found, make_console())


def main() -> None:
    """Run the command line; a UserError becomes one message and status 2."""
    from pipeline.models.quiet import quiet_from_the_start
    from pipeline.runs.environment import NUMPY, QUIET, complete_own

    complete_own({**QUIET, **NUMPY})
    quiet_from_the_start()
    try:
        app(prog_name="onebase")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _read(path: str, overrides: list[str]) -> Recipe:
    from pipeline.terminal.recipes import read_recipe

    return read_recipe(path, overrides)
