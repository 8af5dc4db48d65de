"""The commands. Nothing here imports torch: the command line answers at once."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="One recipe takes a 4-bit base model through pretraining, SFT, reward model and DPO.",
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


@app.command()
def ls() -> None:
    """List the recipes at hand."""
    for name, path in _recipes().items():
        print(f"{name:<32} {_about(path)}")


@app.command()
def cp(name: str, to: Path) -> None:
    """Copy a recipe, to make your own of it."""
    from pipeline.errors import UserError

    source = Path(_find(name))
    if not os.path.isfile(source):
        raise UserError(f"no recipe '{name}' (there is: {', '.join(_recipes())})")
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} is there already; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A run's folder is named by the recipe, so a copy under the old name would overwrite the old run.
    text = source.read_text(encoding="utf-8")
    target.write_text(re.sub(r"(?m)^name: .*$", f"name: {target.stem}", text, count=1), encoding="utf-8")
    print(f"{source} -> {target} (name: {target.stem})")


@app.command()
def check(recipe: RecipePath, override: Overrides = []) -> None:  # noqa: B006
    """Read a recipe, its data and every trainer argument; train nothing."""
    from pipeline.worker import load_rows

    chain = _read(recipe, override)
    for name in chain.order():
        data, sources = load_rows(chain, name)
        counts = sources[0].counts()
        held_out = f", {len(data.test)} held out" if data.test is not None else ""
        asked = f", {len(data.questions)} questions" if data.questions else ""
        refused = sum(len(source.refused) for source in sources)
        unfit = f", {refused} refused" if refused else ""
        print(f"{name}: {len(data.train)} of {counts['rows']} rows from {counts['path']}{held_out}{asked}{unfit}")
    chain.parts()
    from pipeline.stages.check import check_arguments, check_base

    check_base(chain.spec.model, chain.stages)
    check_arguments(chain.spec.model, chain.stages, chain.spec.seed)
    print(f"{recipe}: sound, {len(chain.stages)} stages: {' -> '.join(chain.order())}")


@app.command()
def data(
    recipe: RecipePath,
    stage: Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="All, unless some are named.")] = None,
    override: Overrides = [],  # noqa: B006
    show: Annotated[int, typer.Option(metavar="N", min=0, help="Print N rows as the model will see them.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures for machines.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Examine the data: lengths, loss masks, duplicates, overlaps, baselines. Loads no weights.

    All of it is examined, whatever is wrong with some; the exit status is 2 where a run would stop.
    """
    import json

    from rich.console import Console

    from pipeline import doctor
    from pipeline.errors import UserError

    chain = _read(recipe, override)
    names = stage or chain.order()
    for name in names:
        if name not in chain.stages:
            raise UserError(f"no stage '{name}' in the recipe {chain.name} (there is: {', '.join(chain.stages)})")
    if show:
        faults = [fault for name in names for fault in doctor.show_rows(chain, name, show, Console())]
    else:
        found = doctor.examine(chain, names)
        doctor.keep(found, chain, runs)
        faults = doctor.faults_in(found)
        if as_json:
            print(json.dumps(found, ensure_ascii=False, indent=1))
        else:
            doctor.show(found, Console())
    if faults:
        what = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{what} in the data, as told above: a run would stop there")


@app.command()
def plan(
    recipe: RecipePath,
    override: Overrides = [],  # noqa: B006
    runs: Runs = Path("runs"),
    gpu: Annotated[
        str, typer.Option(metavar="CARD", help="Plan for this card (rtx3060, a100-40gb) or memory (12GB).")
    ] = "",
) -> None:
    """Show what a run would do, and why; what each stage needs, whether it fits, and how long it takes."""
    from rich.console import Console

    from pipeline.errors import UserError
    from pipeline.models.spec import hub_commit
    from pipeline.plan import cards
    from pipeline.runner import states
    from pipeline.summary import show_needs, show_states

    card = cards.card(gpu) if gpu else cards.present()
    chain, console = _read(recipe, override), Console()
    unknown = None
    try:
        show_states(states(chain, runs), console)
    except UserError as error:  # its needs follow from shapes alone
        unknown = error
    noted = ""
    try:
        noted = show_needs(chain, card, console).noted
    except UserError as error:
        console.print(f"memory and time: not planned: {error}", highlight=False, markup=False)
    base = chain.spec.model
    if unknown and noted and hub_commit(base.base, base.revision)[1]:  # well known; only the Hub is out of reach
        console.print(f"\nwhat would run is not told: {unknown}", highlight=False, markup=False)
    elif unknown:
        raise unknown


@app.command()
def run(
    recipe: RecipePath,
    override: Overrides = [],  # noqa: B006
    only: Annotated[list[str], typer.Option(metavar="STAGE", help="This stage alone (may be repeated).")] = [],  # noqa: B006
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

    from pipeline import runner, summary
    from pipeline.errors import UserError

    if launch_config and not os.path.isfile(launch_config):
        raise UserError(f"--launch-config: no such file: {launch_config}")
    chain, console = _read(recipe, override), Console()
    try:
        done = runner.run(chain, only, from_ or None, runs, launch_config, force)
    except KeyboardInterrupt:
        again = " ".join([*sys.argv[1:]])
        print(f"stopped. To go on where it stopped, type the same again: onebase {again}", file=sys.stderr)
        raise SystemExit(130) from None
    if done:
        console.print()
        summary.show_results(chain, runs, console)
        summary.show_answers(chain, runs, console)
        summary.show_next(chain, summary.as_typed(recipe, override, runs), runs, console)
    else:
        console.print("everything asked for is fresh; nothing to do")


@app.command()
def status(recipe: RecipePath, override: Overrides = [], runs: Runs = Path("runs")) -> None:  # noqa: B006
    """Show where every stage stands and what the finished ones gained."""
    from rich.console import Console

    from pipeline.runner import states
    from pipeline.summary import show_answers, show_results, show_states

    chain, console = _read(recipe, override), Console()
    show_states(states(chain, runs), console)
    console.print()
    show_results(chain, runs, console)
    show_answers(chain, runs, console)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    override: Overrides = [],  # noqa: B006
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

    from pipeline import evaluator
    from pipeline.summary import as_typed, show_evaluation

    try:
        tasks = [task for task in lm_eval.split(",") if task]
        results = evaluator.launch(_read(recipe, override), runs, judge, tasks)
    except KeyboardInterrupt:
        print("stopped. What has been measured is kept: the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None
    show_evaluation(results, Console())
    print(f"\nonebase report {as_typed(recipe, override, runs)}   makes a page of it")


@app.command()
def report(recipe: RecipePath, override: Overrides = [], runs: Runs = Path("runs")) -> None:  # noqa: B006
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
    from pipeline import chat as chats
    from pipeline.errors import UserError

    if stage and compare:
        raise UserError("name either one STAGE or two with --compare")
    policies = list(compare) if compare else [stage] if stage else []
    chats.talk(chats.opened(run, policies, save_to, new_tokens, temperature))


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's folder, as runs/quickstart.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B")],
) -> None:
    """Show what differs between two runs: recipe, data, numbers with intervals."""
    from rich.console import Console

    from pipeline.compare import show

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
    override: Overrides = [],  # noqa: B006
    runs: Runs = Path("runs"),
) -> None:
    """Publish a finished stage, once it is proven to answer as what was trained."""
    from pipeline.publish.publishing import publish as published

    chain, runs = _run(run, override, runs)
    files = published(chain, stage, to, form, runs=runs, private=private, dry_run=dry_run, overwrite=overwrite)
    for name, size in files:
        print(f"  {size / 2**20:9.2f} MiB  {name}")
    print(f"{'would be published' if dry_run else 'published'}: {len(files)} files to {to}")


@app.command()
def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A recipe, or the folder of a run.")],
    stages: Annotated[list[str], typer.Argument(metavar="STAGE...", help="Each becomes a model of that name.")],
    port: int = 8000,
    override: Overrides = [],  # noqa: B006
    runs: Runs = Path("runs"),
) -> None:
    """Serve finished stages to OpenAI clients, on this machine only."""
    from pipeline.publish.serving import prepared
    from pipeline.publish.serving import serve as served

    chain, runs = _run(run, override, runs)
    folder = prepared(chain, stages, runs)
    print(f"http://127.0.0.1:{port}/v1 serves {', '.join(stages)} (Ctrl-C ends it)", flush=True)
    served(chain, folder, port)


def main() -> None:
    """Run the command line; a UserError becomes one message and status 2."""
    from pipeline.errors import UserError

    try:
        app()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _read(path: str, overrides: list[str]):  # type: ignore[no-untyped-def]
    from pipeline.recipe.recipe import read

    return read(_find(path), *overrides)


def _run(run: str, overrides: list[str], runs: Path):  # type: ignore[no-untyped-def]
    """The recipe of a run named by its recipe or by its folder, and the folder of runs it lies in."""
    from pipeline.errors import UserError

    folder = Path(run)
    if not os.path.isdir(folder):
        return _read(run, overrides), runs
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the folder of a run (no recipe.yaml)")
    chain = _read(str(folder / "recipe.yaml"), overrides)
    if chain.name != folder.resolve().name:
        raise UserError(f"{folder} was renamed: its recipe calls the run '{chain.name}'")
    return chain, folder.resolve().parent


def _recipe_folders() -> list[Path]:
    # In a clone the recipes lie beside the package; an installed wheel puts them under share/.
    return [Path("recipes"), Path(sys.prefix) / "share" / "onebase" / "recipes"]


def _recipes() -> dict[str, Path]:
    for folder in _recipe_folders():
        if folder.is_dir():
            files = [file for file in sorted(folder.rglob("*.yaml")) if "accelerate" not in file.parts]
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def _find(name: str) -> str:
    return name if os.path.exists(name) else str(_recipes().get(name.removesuffix(".yaml"), name))


def _about(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
