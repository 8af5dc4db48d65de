"""onebase serve: finished stages behind an OpenAI-compatible endpoint on loopback, through `transformers serve`.

Each stage is published as merged into the cache, once, which its parity gate guards; the server finds them by their
names, which are the clients' model names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from pipeline.artifact import read_json
from pipeline.errors import UserError
from pipeline.models.published import RECORD
from pipeline.models.spec import cache_folder
from pipeline.publish.publishing import publish
from pipeline.recipe import Recipe

NEEDED = ("fastapi", "uvicorn", "openai")


def prepared(recipe: Recipe, stages: list[str], runs: Path) -> Path:
    """A folder that holds each stage, as merged weights, under its name. What is there already and fresh is kept.

    Raises UserError for a reward model, which answers nothing, and where the server's packages are missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'onebase[serve]'")
    folder = cache_folder() / "serve" / recipe.name
    for stage in stages:
        if stage in recipe.stages and not recipe.kind(stage).answers:
            raise UserError(f"'{stage}' is a reward model: it scores answers and gives none")
        if stage not in recipe.stages:
            raise UserError(f"no stage '{stage}' in the recipe {recipe.name} (there is: {', '.join(recipe.stages)})")
        sealed = recipe.artifact(stage, runs).verify()
        record = read_json(folder / stage / RECORD) or {}
        if (record.get("lineage") or [{}])[-1].get("files") != sealed["files"]:
            print(f"writing {stage} as merged, and comparing it with what was trained ...", flush=True)
            publish(recipe, stage, str(folder / stage), "merged", runs=runs)
    return folder


def serve(folder: Path, port: int) -> None:
    """Serve the models below `folder` on 127.0.0.1 until interrupted."""
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        subprocess.run([*command, "--host", "127.0.0.1", "--port", str(port)], cwd=folder, env=environment, check=True)
    except KeyboardInterrupt:
        return
    except subprocess.CalledProcessError as error:
        raise UserError(f"transformers serve ended with status {error.returncode} (is port {port} free?)") from None
