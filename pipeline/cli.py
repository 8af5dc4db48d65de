"""The commands. Nothing here imports torch: the command line answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.bring import commands as bringing
from pipeline.language.say import speak

if TYPE_CHECKING:
    from pipeline.recipe.recipe import Recipe

app = typer.Typer(
    help="One recipe takes a 4-bit base through pretraining, SFT, reward model, PPO and DPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name that `onebase ls` shows.")]
Overrides = Annotated[
    list[str], typer.Option("-o", "--override", metavar="KEY=VALUE", help="Dotted, e.g. stages.dpo.train.beta=0.05")
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where runs are kept.")]
Lang = Annotated[Literal["en", "zh"], typer.Option("--lang", callback=speak, help="Tell it in English or in Chinese.")]
bringing.add_to(app)


@app.command()
def ls() -> None:
    """List the recipes at hand."""
    from pipeline.terminal.recipes import show_recipes

    show_recipes()


@app.command()
def cp(name: str, to: Path) -> None:
    """Copy a recipe, to make your own of it."""
    from pipeline.terminal.recipes import copy_recipe

    copy_recipe(name, to)


@app.command()
def check(recipe: RecipePath, override: Overrides = []) -> None:
    """Read a recipe, its data and every trainer argument; train nothing."""
    from pipeline.stages.check import check_arguments, check_base, check_trackers
    from pipeline.terminal.states import show_rows

    chain = _read(recipe, override)
    show_rows(chain)
    chain.parts()
    check_base(chain.spec.model, chain.stages)
    check_trackers(chain.stages)
    check_arguments(chain.spec.model, chain.stages, chain.spec.seed)
    print(f"{recipe}: sound, {len(chain.stages)} stages: {' -> '.join(chain.order())}")


@app.command()
def data(
    recipe: RecipePath,
    stage: Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="All, unless some are named.")] = None,
    override: Overrides = [],
    show: Annotated[int, typer.Option(metavar="N", min=0, help="Print N rows as the model will see them.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures for machines.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Examine the data: lengths, loss masks, duplicates, overlaps, baselines. Loads no weights.

    All of it is examined, whatever is wrong with some; the exit status is 2 where a run would stop.
    """
    from rich.console import Console

    from pipeline.errors import UserError
    from pipeline.terminal.data import show_examination, show_rows

    chain = _read(recipe, override)
    names = chain.named(stage or chain.order())
    if show:
        faults = [fault for name in names for fault in show_rows(chain, name, show, Console())]
    else:
        faults = show_examination(chain, names, runs, as_json, Console())
    if faults:
        what = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{what} in the data, listed above: a run would stop at them")


@app.command()
def plan(
    recipe: RecipePath,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    gpu: Annotated[
        str, typer.Option(metavar="CARD", help="Plan for this card (rtx3060, a100-40gb) or memory (12GB).")
    ] = "",
) -> None:
    """Show what a run would do, and why; what each stage needs, whether it fits, and how long it takes."""
    from rich.console import Console

    from pipeline.plan import cards
    from pipeline.terminal.plan import show_plan

    show_plan(_read(recipe, override), runs, cards.find_card(gpu) if gpu else cards.detect_card(), Console())


@app.command()
def run(
    recipe: RecipePath,
    override: Overrides = [],
    only: Annotated[list[str], typer.Option(metavar="STAGE", help="This stage alone (may be repeated).")] = [],
    from_: Annotated[
        str, typer.Option("--from", metavar="STAGE", help="This stage and those that go on from it.")
    ] = "",
    runs: Runs = Path("runs"),
    launch_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An accelerate config, for several GPUs.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although a stage misses what `expect:` demands.")
    ] = False,
) -> None:
    """Run the stages that are not fresh, one process each."""
    from rich.console import Console

    from pipeline.errors import UserError
    from pipeline.report.ending import write_if_possible
    from pipeline.runs import runner
    from pipeline.terminal import results
    from pipeline.terminal.story import show_story

    if launch_config and not os.path.isfile(launch_config):
        raise UserError(f"--launch-config: no such file: {launch_config}")
    chain, console = _read(recipe, override), Console()
    try:
        done = runner.run(chain, only, from_ or None, runs, launch_config, force)
    except KeyboardInterrupt:
        again = " ".join(sys.argv[1:])
        print(f"stopped. To go on where it stopped, type the same again: onebase {again}", file=sys.stderr)
        raise SystemExit(130) from None
    if done:
        console.print()
        show_story(chain, runs, write_if_possible(chain, recipe, runs, override), console)
        results.show_results(chain, runs, console)
        results.show_answers(chain, runs, console)
        results.show_next(chain, results.as_typed(recipe, override, runs), runs, console)
    else:
        console.print("everything asked for is fresh; nothing to do")


@app.command()
def status(recipe: RecipePath, override: Overrides = [], runs: Runs = Path("runs")) -> None:
    """Show where every stage stands and what the finished ones gained."""
    from rich.console import Console

    from pipeline.runs.states import states
    from pipeline.terminal.results import show_answers, show_results
    from pipeline.terminal.states import show_states

    chain, console = _read(recipe, override), Console()
    show_states(states(chain, runs), console)
    console.print()
    show_results(chain, runs, console)
    show_answers(chain, runs, console)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    judge: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="URL MODEL", help="An OpenAI-compatible endpoint on this machine that compares answers."),
    ] = None,
    lm_eval: Annotated[
        str, typer.Option("--lm-eval", metavar="TASKS", help="Also these tasks of lm-eval: names or files, by commas.")
    ] = "",
) -> None:
    """Measure every finished stage on held-out data, each against the one before, with 95 % intervals."""
    from rich.console import Console

    from pipeline.evaluate.evaluation import launch
    from pipeline.terminal.results import as_typed, show_evaluation

    try:
        tasks = [task for task in lm_eval.split(",") if task]
        results = launch(_read(recipe, override), runs, judge, tasks)
    except KeyboardInterrupt:
        print("stopped. What has been measured is kept: the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    show_evaluation(results, Console())
    print(f"\nonebase report {as_typed(recipe, override, runs)}   makes a page of it")


@app.command()
def report(recipe: RecipePath, override: Overrides = [], runs: Runs = Path("runs"), lang: Lang = "en") -> None:
    """Make one self-contained page (HTML, and Markdown) of a run: verdicts, numbers, curves, samples, cost."""
    from pipeline.report.page import write

    for path in write(_read(recipe, override), recipe, runs, overrides=override):
        print(path)


@app.command()
def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as runs/quickstart.")],
    stage: Annotated[
        str, typer.Argument(metavar="[STAGE]", help="A policy stage, or base; the last one unless named.")
    ] = "",
    compare: Annotated[
        tuple[str, str] | None, typer.Option(metavar="STAGE STAGE", help="Two policies answer side by side.")
    ] = None,
    save_to: Annotated[Path, typer.Option(metavar="FILE", help="Where /save keeps corrected answers.")] = Path(
        "corrections.jsonl"
    ),
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to what a run has trained."""
    from pipeline.errors import UserError
    from pipeline.terminal.chat import open_chat, talk

    if stage and compare:
        raise UserError("name either one STAGE or two with --compare")
    talk(open_chat(run, list(compare or filter(None, [stage])), save_to, new_tokens, temperature))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's folder, as runs/quickstart.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B")],
) -> None:
    """Show what differs between two runs: recipe, data, numbers with intervals."""
    from rich.console import Console

    from pipeline.terminal.compare import show

    show(run_a, run_b, Console())


@app.command()
def publish(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A recipe, or the folder of a run.")],
    stage: str,
    to: Annotated[str, typer.Option(metavar="DIR|hub:OWNER/NAME", help="A folder, or a repository on the Hub.")],
    form: Annotated[str, typer.Option("--as", metavar="FORM", help="adapter, merged or gguf.")] = "adapter",
    private: Annotated[bool, typer.Option(help="Create the Hub repository as a private one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and check, but show only files and sizes.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace what this did not write.")] = False,
    override: Overrides = [],
    runs: Runs = Path("runs"),
) -> None:
    """Publish a finished stage, once it is proven to answer as what was trained."""
    from pipeline.publish.publishing import publish as published
    from pipeline.terminal.recipes import read_run

    chain, runs = read_run(run, override, runs)
    files = published(chain, stage, to, form, runs=runs, private=private, dry_run=dry_run, overwrite=overwrite)
    for name, size in files:
        print(f"  {size / 2**20:9.2f} MiB  {name}")
    print(f"{'would be published' if dry_run else 'published'}: {len(files)} files to {to}")


@app.command()
def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A recipe, or the folder of a run.")],
    stages: Annotated[list[str], typer.Argument(metavar="STAGE...", help="Each becomes a model of that name.")],
    port: int = 8000,
    override: Overrides = [],
    runs: Runs = Path("runs"),
) -> None:
    """Serve finished stages to OpenAI clients, on this machine only."""
    from pipeline.publish import serving
    from pipeline.terminal.recipes import read_run

    chain, runs = read_run(run, override, runs)
    folder = serving.prepare(chain, stages, runs)
    print(f"http://127.0.0.1:{port}/v1 serves {', '.join(stages)} (Ctrl-C ends it)", flush=True)
    serving.serve(chain, folder, port)


def main() -> None:
    """Run the command line; a UserError becomes one message and status 2."""
    from pipeline.errors import UserError
    from pipeline.models.quiet import quiet_from_the_start
    from pipeline.runs.environment import QUIET, complete_own

    complete_own(QUIET)
    quiet_from_the_start()
    try:
        app()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _read(path: str, overrides: list[str]) -> Recipe:
    from pipeline.terminal.recipes import read_recipe

    return read_recipe(path, overrides)
