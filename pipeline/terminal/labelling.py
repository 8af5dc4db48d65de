"""onebase label: what it prints, and the page served until Ctrl-C."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.errors import UserError
from pipeline.language.say import say, say_again
from pipeline.terminal.help import command
from pipeline.terminal.options import Lang, Overrides, RecipePath, Runs

NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "markdown_it": "markdown-it-py"}
PASSWORD = "ONEBASE_PASSWORD"
SHORTEST = 8


def add_to(app: typer.Typer) -> None:
    command(app, "label", "onebase label my.yaml sft")(label)


def label(
    recipe: RecipePath,
    stages: Annotated[
        list[str] | None,
        typer.Argument(metavar="STAGE", help="Whose answers to compare. Without it, the last that answers."),
    ] = None,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    prompts: Annotated[str, typer.Option(metavar="FILE", help="Prompts to answer; else the recipe's own.")] = "",
    gold: Annotated[str, typer.Option(metavar="FILE", help="Comparisons with known answers, mixed in.")] = "",
    answers: Annotated[int, typer.Option(metavar="N", min=2, max=9, help="Answers to each prompt.")] = 2,
    temperature: Annotated[
        list[float] | None, typer.Option(metavar="T", min=0, help="Of sampling. Twice: one for each answer.")
    ] = None,
    best_of: Annotated[
        int, typer.Option(metavar="N", min=1, help="Show the best of N draws, by the run's reward model.")
    ] = 1,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of an answer.")] = 256,
    choose: Annotated[
        Literal["random", "gap", "uncertain", "disagree"],
        typer.Option(help="Which pairs come first, by the scores of the run's reward model."),
    ] = "random",
    two_people: Annotated[
        float, typer.Option(metavar="SHARE", min=0, max=1, help="Part of the pairs that two people see.")
    ] = 0.0,
    port: Annotated[int, typer.Option(metavar="PORT", help="The port; 0 takes a free one.")] = 8020,
    share: Annotated[bool, typer.Option("--share", help="Open the page to your network, with a password.")] = False,
    lang: Lang = "en",
) -> None:
    """Open a page on which people compare answers.

    Each vote is one line in labels/NAME.jsonl beside the recipe. Train on them with `data: {path: labels/}`.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"labelling needs {', '.join(missing)}: pip install 'onebase[label]'")
    from pipeline.disk.atomic import locked
    from pipeline.label.opening import Wishes, labels_of, open_desk
    from pipeline.label.server import LOOPBACK, Page, listen, serve
    from pipeline.label.wording import read_guidelines
    from pipeline.terminal.recipes import read_recipe
    from pipeline.terminal.results import as_typed

    password = _ask_password() if share else ""
    chain = read_recipe(recipe, override)
    wishes = Wishes(stages or [], temperature or [1.0], answers, new_tokens, choose, two_people, prompts, gold, best_of)
    folder = labels_of(chain)
    refusal = f"another `onebase label` (process {{pid}}) writes to {folder}: use its page, or stop it"
    with locked(folder / ".lock", refusal):
        desk = open_desk(chain, wishes, runs)
        for told in desk.told:
            print(f"  {told}")
        listening = listen("0.0.0.0" if share else LOOPBACK, port)
        desk.drawer.start()
        stages_named = ", ".join(dict.fromkeys(policy.stage for policy in desk.drawer.policies))
        port = listening.getsockname()[1]
        print(say("Answers of {stages}; votes go to {folder}", stages=stages_named, folder=folder))
        if share:
            told = say(
                "Open to your network: whoever knows the password can read the prompts and answers and can vote. "
                "The connection is not encrypted, so use it only in a network you trust."
            )
            print(told)
        print(say("Open http://{host}:{port} in a browser (Ctrl-C ends it)", host=LOOPBACK, port=port), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            serve(Page(desk, read_guidelines(chain.spec.guidelines), password), listening)
    print(say("stopped. Every vote is in {folder}", folder=folder), flush=True)
    if desk.round:
        print(say_again(desk.round.told), flush=True)
    if desk.full:
        print(say("To go on: {command}", command=f"onebase run {as_typed(recipe, override, runs)}"), flush=True)
    if desk.drawer.drawing:
        os._exit(0)  # a thread inside torch cannot be told to end; whatever it has finished is on disk


def _ask_password() -> str:
    """From the environment or the keyboard: on a command line others on the machine could read it."""
    password = os.environ.get(PASSWORD) or (getpass.getpass("Password for the page: ") if sys.stdin.isatty() else "")
    if len(password) < SHORTEST:
        raise UserError(
            f"--share opens the page to your network and needs a password of at least {SHORTEST} characters: type it "
            f"when asked, or set {PASSWORD}"
        )
    return password
