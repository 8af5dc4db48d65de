"""Publishing to a Hub and going on from there: real clients against a Hub on loopback (hub_server.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, head, tiny_tree, write_recipe
from hub_server import Hub, git_oid, serve
from make_tiny_base import make_tiny_base
from publish_run import BASE_ID, finished_run

from pipeline.disk.atomic import file_hashes, write_json
from pipeline.recipe.recipe import read

TOKEN = "hf_onebase_loopback"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    server = serve(str(tmp_path / "hub"), token=TOKEN)
    yield server
    server.stop()


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Of a process that knows the Hub by its address alone; each `home` is a machine that has pulled nothing yet."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    given = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "ONEBASE_CACHE": str(home / "ob")}
    return {**kept, **given, "PYTHONPATH": str(ROOT), **({"HF_TOKEN": token} if token else {})}


def python(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)


def onebase(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *words], env=env, capture_output=True, text=True, cwd=ROOT)


PUSH = """
from pathlib import Path
from pipeline.errors import UserError
from pipeline.publish import hub
try:
    hub.check_right({to!r}, {overwrite})
    print("commit", hub.push({to!r}, Path({folder!r}), private={private}, overwrite={overwrite}))
except UserError as error:
    print("refused:", error)
"""


def push(hub: Hub, folder: Path, home: Path, to: str = "tester/model", token: str | None = TOKEN, **words: Any) -> str:
    code = PUSH.format(to=to, folder=str(folder), **{"private": False, "overwrite": False, **words})
    done = python(code, environment(hub, home, token))
    assert done.returncode == 0, done.stderr
    assert token is None or token not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As publish leaves it: a large file (kept as LFS), small ones, and the record of their hashes."""
    folder = tmp_path / "written"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# A card\n")
    return recorded(folder)


def recorded(folder: Path) -> Path:
    (folder / "onebase.json").unlink(missing_ok=True)
    write_json(folder / "onebase.json", {"form": "adapter", "stage": "sft", "files": file_hashes(folder)})
    return folder


def on_hub(hub: Hub, repository: str = "tester/model") -> tuple[list[str], int]:
    """The files of a repository, and how many commits it has."""
    found = hub.repos.get(("model", repository))
    return (sorted(found["commits"][found["refs"]["main"]]["files"]), len(found["commits"])) if found else ([], 0)


def test_a_push_is_one_commit_and_may_replace_only_its_own(hub: Hub, folder: Path, tmp_path: Path) -> None:
    assert "commit" in push(hub, folder, tmp_path / "home", private=True)
    assert on_hub(hub) == (["README.md", "adapter_model.safetensors", "onebase.json"], 2)
    assert hub.repos[("model", "tester/model")]["private"]
    (folder / "README.md").unlink()
    (folder / "config.json").write_text("{}")
    assert "commit" in push(hub, recorded(folder), tmp_path / "home")
    assert on_hub(hub) == (["adapter_model.safetensors", "config.json", "onebase.json"], 3)

    edit = (
        "from huggingface_hub import HfApi; "
        "HfApi().upload_file(path_or_fileobj=b'{ }', path_in_repo='config.json', repo_id='tester/model')"
    )
    assert python(edit, environment(hub, tmp_path / "home")).returncode == 0
    assert "changed since (first: config.json)" in push(hub, folder, tmp_path / "home")
    assert on_hub(hub)[1] == 4
    assert "commit" in push(hub, folder, tmp_path / "home", overwrite=True)
    assert on_hub(hub)[1] == 5


@pytest.mark.parametrize(
    ("to", "token", "told"),
    [
        ("tester/model", "hf_wrong", "does not accept the token"),
        ("tester/model", None, "hf auth login"),
        ("somebody/model", TOKEN, "may not write to 'somebody'"),
        ("tester", TOKEN, "expected hub:OWNER/NAME"),
    ],
)
def test_no_right_to_push(hub: Hub, folder: Path, tmp_path: Path, to: str, token: str | None, told: str) -> None:
    assert told in push(hub, folder, tmp_path / "home", to, token)
    assert not hub.repos


def test_a_foreign_repository_is_left_alone(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.create("model", "tester/model")
    found = hub.repos[("model", "tester/model")]
    hub.commit(found, "main", {"thesis.md": {"oid": "0" * 40, "size": 5, "data": b"years"}}, "by hand")
    assert "no publication wrote" in push(hub, folder, tmp_path / "home")
    assert on_hub(hub) == (["thesis.md"], 2)


def test_a_server_that_dies_leaves_nothing_partial_and_a_retry_sends_no_large_file_twice(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    hub.fail.append(("POST /api/models/tester/model/commit", 500, 99))
    told = push(hub, folder, tmp_path / "home")
    assert (
        "was not published, and its repository exists, without published files" in told and "HF_HUB_DISABLE_XET" in told
    )
    assert on_hub(hub)[0] == []
    hub.fail.clear()
    uploads = sum(line.startswith("PUT /_lfs/") for line in hub.log)
    assert uploads == 1
    assert "commit" in push(hub, folder, tmp_path / "home")
    assert sum(line.startswith("PUT /_lfs/") for line in hub.log) == uploads
    hub.stop()
    assert "nothing" in push(hub, folder, tmp_path / "home").lower()


SCORES = """
import json, re, sys, torch
import bitsandbytes.nn.modules as layers
from huggingface_hub import hf_hub_download
layers.has_avx512bf16 = lambda: False  # its repacked weights do not fit a base this small
card = open(hf_hub_download("tester/pupil", "README.md")).read()
exec(re.search("```python(.*?)```", card, re.DOTALL)[1])
ids = tokenizer("The lighthouse keeper")["input_ids"]
model.load_adapter(sys.argv[1], "sealed")
for adapter in ("default", "sealed"):
    model.set_adapter(adapter)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        print(json.dumps(model(torch.tensor([ids])).logits[0, -1].float().tolist()))
"""

PARENT = """
from pipeline.recipe.recipe import read
print(read({recipe!r}).parent_artifacts("dpo")["policy"].verify().model_dump_json())
"""


def test_published_pulled_loaded_and_trained_on_from(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    recipe = finished_run(tiny_base, tmp_path / "runs", "pretrain", "sft")
    here = environment(hub, tmp_path / "home")
    upload = (
        f"from huggingface_hub import HfApi; HfApi().create_repo({BASE_ID!r}); "
        f"HfApi().upload_folder(folder_path={str(tiny_base)!r}, repo_id={BASE_ID!r})"
    )
    assert python(upload, here).returncode == 0

    run = str(tmp_path / "runs" / "tiny")
    tried = onebase(here, "publish", run, "sft", "--to", "hub:tester/pupil", "--dry-run")
    assert "adapter_model.safetensors" in tried.stdout and on_hub(hub, "tester/pupil")[1] == 0, tried.stderr
    done = onebase(here, "publish", run, "sft", "--to", "hub:tester/pupil")
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr

    # Another machine: pulled by name, it answers as the sealed adapter does.
    there = environment(hub, tmp_path / "elsewhere")
    sealed = recipe.artifact("sft", tmp_path / "runs").adapter
    scored = subprocess.run(
        [sys.executable, "-c", SCORES, str(sealed)], env=there, capture_output=True, text=True, cwd=ROOT
    )
    assert scored.returncode == 0, scored.stderr
    pulled, local = scored.stdout.splitlines()[-2:]
    assert json.loads(pulled) == json.loads(local)

    # Trained on from there, on a data set of the Hub's, and published again: the lineage is carried on.
    pairs = head("comparisons.jsonl", 8, tmp_path / "pairs.jsonl")
    upload = (
        f"from huggingface_hub import HfApi; HfApi().create_repo('tester/pairs', repo_type='dataset'); "
        f"HfApi().upload_file(path_or_fileobj={pairs!r}, path_in_repo='train.jsonl', repo_id='tester/pairs', "
        "repo_type='dataset')"
    )
    assert python(upload, here).returncode == 0
    train = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "max_length": 128}
    train |= {"push_to_hub": True, "hub_model_id": "tester/by-trl"}
    tree: dict[str, Any] = {
        "name": "next",
        "model": {"base": "hub:tester/pupil", "chat_template": "recipes/templates/chatml.jinja"},
        "stages": {"dpo": {"data": {"path": "tester/pairs"}, "train": {**train, "gradient_checkpointing": False}}},
    }
    theirs = tmp_path / "theirs"
    went_on = onebase(there, "run", str(write_recipe(tree, tmp_path / "next.yaml")), "--runs", str(theirs))
    assert went_on.returncode == 0, went_on.stdout + went_on.stderr
    by_trl = hub.repos[("model", "tester/by-trl")]
    pushed = by_trl["commits"][by_trl["refs"]["main"]]["files"]
    assert "adapter_model.safetensors" in pushed
    assert json.loads(pushed["adapter_config.json"]["data"])["base_model_name_or_path"] == BASE_ID
    written = [file.read_bytes() for file in theirs.rglob("*") if file.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
    manifest = json.loads((theirs / "next" / "dpo" / "manifest.json").read_text())
    parent = manifest["parents"]["policy"]
    assert parent["hub"].startswith("tester/pupil@")
    assert parent["adapter"] == file_hashes(sealed)["adapter_model.safetensors"]
    assert [entry["stage"] for entry in parent["lineage"]] == ["pretrain", "sft"]
    assert manifest["invariants"]["base_equals_parents"] and manifest["invariants"]["step_0_margin"] == 0
    assert manifest["parts"]["data"]["path"] == "hub:" + hub.repos[("dataset", "tester/pairs")]["refs"]["main"]
    again = onebase(there, "publish", str(theirs / "next"), "dpo", "--to", "hub:tester/graduate")
    assert again.returncode == 0, again.stdout + again.stderr

    # A third machine goes on from that, by `from:` and at a revision.
    commit = hub.repos[("model", "tester/graduate")]["refs"]["main"]
    stage = {**tree["stages"]["dpo"], "from": f"hub:tester/graduate@{commit}"}
    tree |= {"name": "third", "model": {**tree["model"], "base": BASE_ID}, "stages": {"dpo": stage}}
    third = python(
        PARENT.format(recipe=str(write_recipe(tree, tmp_path / "third.yaml"))), environment(hub, tmp_path / "third")
    )
    assert third.returncode == 0, third.stderr
    parent = json.loads(third.stdout.splitlines()[-1])
    assert parent["files"]["adapter_model.safetensors"] == manifest["files"]["adapter_model.safetensors"]
    assert [entry["stage"] for entry in parent["lineage"]] == ["pretrain", "sft", "dpo"]
    assert parent["lineage"][-1]["parents"]["policy"]["hub"].startswith("tester/pupil@")


def test_what_trl_pushes_from_a_local_base_names_no_folder(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"]["public_id"] = BASE_ID
    tree["stages"] = {"pretrain": tree["stages"]["pretrain"]}
    tree["stages"]["pretrain"]["train"] |= {"push_to_hub": True, "hub_model_id": "tester/by-trl", "max_steps": 2}
    recipe, runs = write_recipe(tree, tmp_path / "local.yaml"), tmp_path / "runs"
    done = onebase(environment(hub, tmp_path / "home"), "run", str(recipe), "--runs", str(runs))
    assert done.returncode == 0, done.stdout + done.stderr
    by_trl = hub.repos[("model", "tester/by-trl")]
    pushed = {name: hub.content(entry) for name, entry in by_trl["commits"][by_trl["refs"]["main"]]["files"].items()}
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == BASE_ID
    assert f"base_model: {BASE_ID}" in pushed["README.md"].decode()
    paths = [str(tiny_base).encode(), str(tmp_path).encode()]
    named = {name for name, content in pushed.items() if any(path in content for path in paths)}
    assert named <= {"training_args.bin"}  # transformers' own, which holds all arguments; docs/publishing.md says so


def uploaded(hub: Hub, folder: Path, repository: str) -> str:
    """Commit a folder to a repository of the Hub, and say which commit that is."""
    files = {}
    for file in folder.iterdir():
        data = file.read_bytes()
        files[file.name] = {"oid": git_oid(data), "size": len(data), "data": data}
    hub.create("model", repository)
    return str(hub.commit(hub.repos["model", repository], "main", files, "by hand"))


def test_a_base_on_the_hub_is_loaded_at_the_commit_it_was_fingerprinted_at(
    hub: Hub, tiny_base: Path, tmp_path: Path
) -> None:
    """Its branch moves on once the machine has seen it: to other weights, and a tokenizer that cannot stop."""
    from pipeline.models import base
    from pipeline.models.spec import ModelSpec

    local = ModelSpec(base=str(tiny_base), dtype="bfloat16")
    tokenizer = base.load_tokenizer(local)
    seen = base.frozen_digest(base.load_base(local, tokenizer))
    first, machine = uploaded(hub, tiny_base, BASE_ID), environment(hub, tmp_path / "home")
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"]["base"] = BASE_ID
    tree["stages"] = {"pretrain": tree["stages"]["pretrain"]}
    tree["stages"]["pretrain"]["train"]["max_steps"] = 1
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    assert onebase(machine, "plan", str(recipe), "--gpu", "12GB").returncode == 0
    moved = make_tiny_base(tmp_path / "moved", seed=1)
    config = json.loads((moved / "tokenizer_config.json").read_text())
    (moved / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert uploaded(hub, moved, BASE_ID) != first

    done = onebase(machine, "run", str(recipe), "--runs", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs" / "tiny" / "pretrain" / "manifest.json").read_text())
    assert manifest["base_hash"] == f"hub:{BASE_ID}@{first}"
    assert manifest["base_digest"] == seen
    assert read(tmp_path / "runs" / "tiny" / "recipe.yaml").spec.model.revision == first
    hub.stop()
    alone = {**machine, "HF_HUB_OFFLINE": "1"}
    again = onebase(alone, "run", str(recipe), "--runs", str(tmp_path / "runs"))
    assert "Nothing to do" in again.stdout, again.stderr
