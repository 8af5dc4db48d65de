"""onebase label: what it prints, and the page served until Ctrl-C."""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.errors import UserError
from pipeline.language.say import say, say_again
from pipeline.terminal.help import command
from pipeline.terminal.options import Lang, Overrides, RecipePath, Runs

if TYPE_CHECKING:
    from pipeline.evaluate.judge import Judge
    from pipeline.label.desk import Desk
    from pipeline.label.wording import Guidelines

NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "markdown_it": "markdown-it-py"}
PASSWORD = "ONEBASE_PASSWORD"
SHORTEST = 8
LABELS, CHECK = 500, 0.2


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
    arena: Annotated[
        bool, typer.Option("--arena", help="Rate the stages named: each prompt is answered by two of them.")
    ] = False,
    judge: Annotated[
        str,
        typer.Option(metavar="STAGE|URL", help="A reward stage, or a server on this machine, that votes first."),
    ] = "",
    judge_model: Annotated[str, typer.Option(metavar="MODEL", help="The model to ask of the server at --judge.")] = "",
    labels: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Votes that the judge is to give; 500 without it.")
    ] = None,
    check: Annotated[
        float | None,
        typer.Option(metavar="SHARE", min=0, max=1, help="Part of its pairs for people to check; 0.2 without it."),
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", help="The port; 0 takes a free one.")] = 8020,
    share: Annotated[bool, typer.Option("--share", help="Open the page to your network, with a password.")] = False,
    lang: Lang = "en",
) -> None:
    """Open a page on which people compare answers.

    Each vote is one line in labels/NAME.jsonl beside the recipe. Train on them with `data: {path: labels/}`.
    With --arena it is one in arena/NAME.jsonl, and `onebase eval` rates the stages by them.
    With --judge a model votes first, and the page then shows people a part of its pairs.
    """
    from pipeline.disk.atomic import locked
    from pipeline.label.opening import Wishes, folder_of, open_desk
    from pipeline.terminal.recipes import read_recipe
    from pipeline.terminal.results import as_typed

    others = {"--arena": arena, "--answers": answers > 2, "--two-people": two_people, "--gold": gold, "--share": share}
    asked = _find_judge(
        judge, judge_model, bool(labels) or check is not None, [name for name in others if others[name]]
    )
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing and not asked:
        raise UserError(f"labelling needs {', '.join(missing)}: pip install 'onebase[label]'")
    password = _ask_password() if share else ""
    chain = read_recipe(recipe, override)
    wishes = Wishes(
        stages or [], temperature or [1.0], answers, new_tokens, choose, two_people, prompts, gold, best_of, arena
    )
    if isinstance(asked, str):
        wishes = replace(wishes, judge=asked)
    folder = folder_of(chain, wishes)
    refusal = f"another `onebase label` (process {{pid}}) writes to {folder}: use its page, or stop it"
    with locked(folder / ".lock", refusal):
        desk = open_desk(chain, wishes, runs)
        for told in desk.told:
            print(f"  {told}")
        if asked:
            _let_vote(desk, asked, labels or LABELS, CHECK if check is None else check)
        else:
            from pipeline.label.wording import read_guidelines

            _open_page(desk, read_guidelines(chain.spec.guidelines), port, share, password)
    if desk.round:
        print(say_again(desk.round.told), flush=True)
    if desk.full:
        print(say("To go on: {command}", command=f"onebase run {as_typed(recipe, override, runs)}"), flush=True)
    if desk.drawer.drawing:
        os._exit(0)  # a thread inside torch cannot be told to end; whatever it has finished is on disk


def _find_judge(judge: str, model: str, options: bool, others: list[str]) -> Judge | str | None:
    """The endpoint or the reward stage that is to vote; None where people are. Raises UserError for options that do not
    go together."""
    from pipeline.evaluate.judge import Judge

    if not judge and (model or options):
        raise UserError("--judge-model, --labels and --check are about a judge: say who is to vote with --judge")
    if judge and others:
        raise UserError(f"{others[0]} does not go with --judge, which compares two answers and opens no page")
    if "://" not in judge:
        if model:
            raise UserError(
                f"--judge-model is a model behind an address, and --judge is {judge}: leave one of them out"
            )
        return judge or None
    if not model:
        raise UserError(f"--judge {judge}: name the model to ask there with --judge-model")
    return Judge(judge, model)


def _let_vote(desk: Desk, judge: Judge | str, labels: int, check: float) -> None:
    from pipeline.label.judging import annotator_of, judge_pairs

    name = annotator_of(judge)
    print(say("{judge} votes, {labels} times in all (Ctrl-C ends it)", judge=name, labels=labels), flush=True)
    try:
        count = judge_pairs(desk, judge, labels, check)
        print(say("{judge} has given {n} votes. People check its pairs with onebase label.", judge=name, n=count))
    except KeyboardInterrupt:
        print(say("stopped. Every vote is in {folder}", folder=desk.folder), flush=True)


def _open_page(desk: Desk, guidelines: Guidelines, port: int, share: bool, password: str) -> None:
    from pipeline.label.server import LOOPBACK, Page, listen, serve

    listening = listen("0.0.0.0" if share else LOOPBACK, port)
    desk.drawer.start()
    stages_named = ", ".join(dict.fromkeys(policy.stage for policy in desk.drawer.policies))
    port = listening.getsockname()[1]
    print(say("Answers of {stages}; votes go to {folder}", stages=stages_named, folder=desk.folder))
    if share:
        told = say(
            "Open to your network: whoever knows the password can read the prompts and answers and can vote. "
            "The connection is not encrypted, so use it only in a network you trust."
        )
        print(told)
    print(say("Open http://{host}:{port} in a browser (Ctrl-C ends it)", host=LOOPBACK, port=port), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        serve(Page(desk, guidelines, password), listening)
    print(say("stopped. Every vote is in {folder}", folder=desk.folder), flush=True)


def _ask_password() -> str:
    """From the environment or the keyboard: on a command line others on the machine could read it."""
    password = os.environ.get(PASSWORD) or (getpass.getpass("Password for the page: ") if sys.stdin.isatty() else "")
    if len(password) < SHORTEST:
        raise UserError(
            f"--share opens the page to your network and needs a password of at least {SHORTEST} characters: type it "
            f"when asked, or set {PASSWORD}"
        )
    return password
