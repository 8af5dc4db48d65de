"""The commands that give a finished stage away: as files or on the Hub, and to OpenAI clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.terminal.help import command
from pipeline.terminal.machine import print_json, stdout_kept
from pipeline.terminal.options import AsJson, Overrides, RunOrRecipe, Runs


def add_to(app: typer.Typer) -> None:
    command(app, "publish", "onebase publish runs/quickstart dpo --to out/dpo")(publish)
    command(app, "serve", "onebase serve runs/quickstart sft dpo")(serve)


def publish(
    run: RunOrRecipe,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The finished stage to publish.")],
    to: Annotated[str, typer.Option(metavar="DIR|hub:OWNER/NAME", help="A folder, or a repository on the Hub.")],
    form: Annotated[str, typer.Option("--as", metavar="FORM", help="adapter, merged or gguf.")] = "adapter",
    private: Annotated[bool, typer.Option("--private", help="Create the Hub repository as a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write, check and list the files. Publish nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace what OneBase did not write.")] = False,
    override: Overrides = [],
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Publish a stage, once it is proven to answer as it was trained."""
    from pipeline.publish.publishing import publish as published
    from pipeline.terminal.recipes import read_run

    with stdout_kept(as_json):
        chain, runs = read_run(run, override, runs)
        files = published(chain, stage, to, form, runs=runs, private=private, dry_run=dry_run, overwrite=overwrite)
    if as_json:
        return print_json({"stage": stage, "form": form, "to": to, "dry_run": dry_run, "files": dict(files)})
    for name, size in files:
        print(f"  {size / 2**20:9.2f} MiB  {name}")
    print(f"{'would be published' if dry_run else 'published'}: {len(files)} files to {to}")


def serve(
    run: RunOrRecipe,
    stages: Annotated[list[str], typer.Argument(metavar="STAGE", help="Each becomes a model of that name.")],
    port: Annotated[int, typer.Option(metavar="PORT", help="The port on 127.0.0.1.")] = 8000,
    override: Overrides = [],
    runs: Runs = Path("runs"),
) -> None:
    """Serve finished stages to OpenAI clients on this machine."""
    from pipeline.publish import serving
    from pipeline.terminal.recipes import read_run

    chain, runs = read_run(run, override, runs)
    folder = serving.prepare(chain, stages, runs)
    print(f"http://127.0.0.1:{port}/v1 serves {', '.join(stages)} (Ctrl-C ends it)", flush=True)
    serving.serve(chain, folder, port)
