"""onebase serve: finished stages behind an OpenAI-compatible endpoint on loopback, through `transformers serve`.

The server is given a Hub cache of its own. It holds one model for each stage, which is its adapter, and beside them the
base once, in the 4 bits it was trained in. So clients find the stages by name, and nothing else that is on the machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from pipeline.disk.artifact import WEIGHTS
from pipeline.disk.atomic import digest, write_json, write_text, written_whole
from pipeline.errors import UserError
from pipeline.models.quiet import quiet
from pipeline.models.spec import cache_folder
from pipeline.publish import adapter
from pipeline.publish.sealed import Sealed, read_sealed
from pipeline.recipe.recipe import Recipe

NEEDED = ("fastapi", "uvicorn", "openai")
SERVER = """
import bitsandbytes.nn.modules as layers
layers.has_avx512bf16 = lambda: False  # weights repacked for it are not those of training, nor fit all shapes
import os
from fastapi import HTTPException
from transformers.cli.serving.model_manager import ModelManager
served = sorted(name.removeprefix("models--") for name in os.listdir() if name.startswith("models--"))
pinned = ModelManager.process_model_name
def known(model):
    if str(model).partition("@")[0] not in served:
        raise HTTPException(404, f"no model {model!r}; served are {', '.join(served)}")
    return pinned(model)
ModelManager.process_model_name = staticmethod(known)  # of a name that is not there it makes a status 500
from transformers.cli.transformers import main
main()
"""


def prepare(recipe: Recipe, stages: list[str], runs: Path) -> Path:
    """A Hub cache that holds each stage as a model of that name.

    Raises UserError for a stage that is not finished, for one with a score head, which answers nothing, and where
    the server's packages are missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: pip install 'onebase[serve]'")
    sources = [read_sealed(recipe, stage, runs) for stage in dict.fromkeys(stages)]
    for source in sources:
        if source.num_labels:
            raise UserError(f"'{source.artifact.name}' is {source.what}: it scores texts and writes no answers")
    quiet()
    base = _base(recipe, sources[0])
    folder = cache_folder() / "serve" / recipe.name
    with written_whole(folder) as new:
        for source in sources:
            files = new / f"models--{source.artifact.name}" / "snapshots" / source.manifest.files[WEIGHTS][:40]
            files.mkdir(parents=True)
            adapter.write_tokenizer(source, files)
            shutil.copyfile(source.artifact.adapter / WEIGHTS, files / WEIGHTS)
            shutil.copyfile(base / "config.json", files / "config.json")
            write_json(
                files / "adapter_config.json",
                {**adapter.config(source), "base_model_name_or_path": str(base), "revision": None},
            )
            write_text(files.parents[1] / "refs" / "main", files.name)
    return folder


def _base(recipe: Recipe, source: Sealed) -> Path:
    """The base as training holds it, written once, with the stop tokens of the training template."""
    from transformers import GenerationConfig

    from pipeline.models import base

    folder = cache_folder() / "serve" / f".base-{digest({**recipe.model_parts(), 'dtype': source.model.dtype})[:16]}"
    if not (folder / "config.json").is_file():
        print(f"writing the base in {source.model.quantize} to {folder}, once ...", flush=True)
        with written_whole(folder) as new:
            model = base.load_base(source.model, adapter.write_tokenizer(source, new))
            # As OpenAI's clients expect: what they ask of temperature is heeded, and all tokens may be drawn.
            model.generation_config = GenerationConfig.from_pretrained(new, do_sample=True, top_k=0)
            model.save_pretrained(new)
    return folder.absolute()


def serve(recipe: Recipe, folder: Path, port: int) -> None:
    """Become the server of the models in `folder`, on 127.0.0.1. Raises UserError if the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(f"port {port} of 127.0.0.1 cannot be used: {error}; name another with --port") from None
    attention = ["--attn-implementation", recipe.spec.model.stock_attention]
    where = ["--host", "127.0.0.1", "--port", str(port)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.chdir(folder)  # a model's name is not to be taken for a folder of the user's
    os.execve(
        sys.executable,
        [sys.executable, "-c", SERVER, "serve", *where, *attention],
        {**os.environ, **quiet, "HF_HUB_CACHE": str(folder.absolute())},
    )
