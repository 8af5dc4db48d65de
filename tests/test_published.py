"""A publication on the Hub may be anybody's: whatever it says, nothing outside the cache is written or deleted."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_recipe
from hub_server import git_oid, serve
from publish_run import finished_run
from test_fuzz import mutated
from test_publish_hub import environment, onebase

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.errors import UserError
from pipeline.models import published
from pipeline.models.record import SIZES
from pipeline.publish import adapter, card, measured
from pipeline.publish.publishing import _write_record
from pipeline.publish.sealed import Sealed, ancestors, read_sealed
from pipeline.recipe.recipe import build
from pipeline.runs.stage import _note_parent

MUTATIONS = 700
HOSTILE: list[Any] = [
    None, True, -1, 10**30, 10**400, 1.5, 1e308, float("inf"), float("nan"), "", "..", "../..", "/", "~", "/etc", "a/b",
    "../../victim", "victim", "\x00", "\x1b[2J", "\ud800", "x" * 5000, "a\nb", "<script>", "|", "(a+)+$", [], {}, [[]],
    [None], [{}], {"": ""}, {"../x": "y"}, {"gone": True}, "0" * 64, "hub:evil/x", "megatron.core", {"a": [1, {}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def honest(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sealed, Path]:
    """A stage as it was sealed, and its files as they are published."""
    folder = tmp_path_factory.mktemp("honest")
    runs = folder / "runs"
    source = read_sealed(finished_run(tiny_base, runs, "pretrain", "sft"), "sft", runs)
    written = folder / "written"
    written.mkdir()
    adapter.write(source, written)
    _write_record(source, "adapter", written, adapter.loading(source, written), {"adapter": {"prompts": 7}})
    return source, written


def tree_of(base: Path, from_: str) -> dict[str, Any]:
    stage = {"from": from_, "data": {"path": "data/demonstrations.jsonl", "limit": 4}}
    return {"name": "victim", "model": {"base": str(base)}, "stages": {"sft": stage}}


EVIL: dict[str, Callable[[Any, Path], Any]] = {
    "an absolute stage": lambda record, victim: record.update(stage=str(victim)),
    "a stage that climbs": lambda record, victim: record.update(stage="../../victim"),
    "a file that climbs": lambda record, victim: record["files"].update({"../../../adapter_x": "0" * 64}),
    "a file with a folder": lambda record, victim: record["files"].update({f"{victim}/adapter_x": "0" * 64}),
}


def test_check_refuses_a_hostile_publication_and_the_victims_folder_stays(
    tiny_base: Path, honest: tuple[Sealed, Path], tmp_path: Path
) -> None:
    hub = serve(str(tmp_path / "hub"), token="none")
    victim = tmp_path / "home" / "victim"
    victim.mkdir(parents=True)
    (victim / "thesis.txt").write_text("years of work")
    try:
        for number, (what, change) in enumerate(EVIL.items()):
            record = json.loads((honest[1] / "onebase.json").read_text())
            record["files"] = {name: sha for name, sha in record["files"].items() if name.startswith("adapter_")}
            change(record, victim)
            record["lineage"][-1]["stage"] = record["stage"]
            files = {name: (honest[1] / name).read_bytes() for name in ("adapter_config.json", WEIGHTS)}
            files["onebase.json"] = json.dumps(record).encode()
            held = {name: {"oid": git_oid(data), "size": len(data), "data": data} for name, data in files.items()}
            hub.create("model", f"evil/x{number}")
            hub.commit(hub.repos["model", f"evil/x{number}"], "main", held, "evil")
            recipe = write_recipe(tree_of(tiny_base, f"hub:evil/x{number}"), tmp_path / "recipe.yaml")
            done = onebase(environment(hub, tmp_path / "home"), "check", str(recipe))
            said = done.stderr.partition("error: ")[2]  # before it stands the client's progress
            assert done.returncode == 2 and said.startswith(f"hub:evil/x{number}: its onebase.json"), what
            assert len(said.splitlines()) == 1 and "Traceback" not in done.stderr
            assert [file.name for file in victim.iterdir()] == ["thesis.txt"], what
        assert not list((tmp_path / "home" / "ob").rglob("manifest.json"))
    finally:
        hub.stop()


def test_a_file_that_is_too_large_is_not_downloaded(tmp_path: Path) -> None:
    hub = serve(str(tmp_path / "hub"), token="none")
    try:
        hub.create("model", "evil/large")
        (tmp_path / "hub" / "lfs" / ("0" * 64)).write_bytes(b"")
        large = {"oid": "0" * 40, "size": 1 << 40, "sha256": "0" * 64}
        hub.commit(hub.repos["model", "evil/large"], "main", {WEIGHTS: large}, "evil")
        recipe = write_recipe(tree_of(tmp_path, "hub:evil/large"), tmp_path / "recipe.yaml")
        done = onebase(environment(hub, tmp_path / "home"), "check", str(recipe))
        assert done.returncode == 2 and "adapter_model.safetensors is larger than 32768 MiB" in done.stderr
        assert not any("/resolve/" in line for line in hub.log)
    finally:
        hub.stop()


@pytest.fixture
def offered(
    honest: tuple[Sealed, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[Path, str]]]:
    """Lay out a publication as the Hub's client does after a download, with files of it exchanged."""
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    count = 0

    def offer(**exchanged: bytes) -> tuple[Path, str]:
        nonlocal count
        count += 1
        snapshot = tmp_path / "hub" / "models--evil--x" / "snapshots" / f"{count:040x}"[::-1]
        snapshot.mkdir(parents=True)
        os.link(honest[1] / WEIGHTS, snapshot / WEIGHTS)
        for name in ("onebase.json", "adapter_config.json"):
            (snapshot / name).write_bytes(exchanged.get(name.split(".")[0], (honest[1] / name).read_bytes()))
        return snapshot, f"hub:evil/x{count}"

    yield offer
    published.pulled.cache_clear()


def taken(offer: tuple[Path, str]) -> Artifact:
    return published.taken(offer[1], "evil/x", offer[0])


def with_config(honest: Path, **words: Any) -> dict[str, bytes]:
    """A publication whose adapter_config.json is another, and whose record says so."""
    config = json.dumps({**json.loads((honest / "adapter_config.json").read_text()), **words}).encode()
    record = json.loads((honest / "onebase.json").read_text())
    record["files"]["adapter_config.json"] = hashlib.sha256(config).hexdigest()
    return {"onebase": json.dumps(record).encode(), "adapter_config": config}


def test_the_honest_one_is_taken_whole(honest: tuple[Sealed, Path], offered: Any) -> None:
    artifact = taken(offered())
    manifest, record = artifact.verify(), json.loads((honest[1] / "onebase.json").read_text())
    assert [entry.as_json() for entry in manifest.lineage] == record["lineage"] and manifest.load == record["load"]
    assert artifact.name == "sft" and {"adapter_config.json", WEIGHTS} == set(manifest.files)
    assert (artifact.adapter / WEIGHTS).read_bytes() == (honest[1] / WEIGHTS).read_bytes()


def test_a_stage_of_a_kind_that_is_not_known_here_is_refused(
    honest: tuple[Sealed, Path], offered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((honest[1] / "onebase.json").read_text())
    record["kind"] = record["lineage"][-1]["kind"] = "distil"
    artifact = taken(offered(onebase=json.dumps(record).encode()))
    told = r"stages.sft.from: hub:evil/x continues a distil stage, which this version"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=told):
        patch.setattr(published, "pulled", lambda reference: artifact)
        build(tree_of(tmp_path, "hub:evil/x"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"megatron_core": "os", "megatron_config": {"a": 1}}, "megatron"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping"),
        ({"target_modules": "(([a-z])+.)+$"}, "target_modules"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"corda_config": {"cache_file": "/etc/passwd"}}, "corda_config"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"base_model_name_or_path": "evil/other"}, "name different bases"),
        ({"base_model_name_or_path": "/etc"}, "base_model_name_or_path"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"r": 10**9}, "r:"),
    ],
)
def test_what_peft_would_act_upon_is_refused(
    honest: tuple[Sealed, Path], offered: Any, words: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as refused:
        taken(offered(**with_config(honest[1], **words)))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_published_names_modules_and_no_pattern(honest: tuple[Sealed, Path], tmp_path: Path) -> None:
    """So that nobody who pulls it has to match a stranger's regular expression."""
    place = Artifact(shutil.copytree(honest[0].artifact.folder, tmp_path / "sft"))
    wanted = json.loads((place.adapter / "adapter_config.json").read_text())
    pattern = json.dumps({**wanted, "target_modules": r".*layers\.\d+\..*_proj"})
    (place.adapter / "adapter_config.json").write_text(pattern)
    told = adapter.config(replace(honest[0], artifact=place))
    assert told["target_modules"] == sorted(wanted["target_modules"])


def test_altered_files_links_and_what_is_no_adapter_are_refused(
    honest: tuple[Sealed, Path], offered: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="adapter_config.json is not the file that was published"):
        taken(offered(adapter_config=b"{}"))
    secret = tmp_path / "secret"
    shutil.copyfile(honest[1] / WEIGHTS, secret)
    snapshot, reference = offered()
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(secret)
    with pytest.raises(UserError, match="a link to somewhere else"):
        taken((snapshot, reference))
    snapshot, reference = offered()
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).write_bytes(b"\x80\x04pickled")
    record = json.loads((honest[1] / "onebase.json").read_text())
    for files in (record["files"], record["lineage"][-1]["files"]):
        files[WEIGHTS] = hashlib.sha256(b"\x80\x04pickled").hexdigest()
    (snapshot / "onebase.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        taken((snapshot, reference))
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def raw(record: Any, rng: random.Random) -> bytes:
    data = json.dumps(record).encode()
    how = rng.random()
    if how < 0.03:
        return data[: rng.randrange(len(data))]
    if how < 0.06:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)]) + data[place:]
    if how < 0.07:
        return b'{"form": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    if how < 0.08:
        return data + b" " * SIZES["onebase.json"]
    return data


def changed(value: Any, rng: random.Random) -> Any:
    """One thing in it hostile: a value exchanged, a word added or removed, or a deep nest in its place."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.05:
            return {**value, rng.choice(["x", "../x", "lineage", "gone", "hub", "files", "\x1b"]): rng.choice(HOSTILE)}
        return {**value, key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [*value[:place], changed(value[place], rng), *value[place + 1 :]]
    if rng.random() < 0.02:
        for _ in range(rng.choice([5, 40, 800])):
            value = rng.choice([[value], {"a": value}])
        return value
    return mutated(value, rng) if rng.random() < 0.2 else rng.choice(HOSTILE)


def test_no_mutated_publication_reaches_outside_the_cache_or_gives_a_traceback(
    honest: tuple[Sealed, Path], tiny_base: Path, offered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "victim")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    record = json.loads((honest[1] / "onebase.json").read_text())
    config = json.loads((honest[1] / "adapter_config.json").read_text())
    rng, accepted, before = random.Random(14), 0, listing(tmp_path)
    for _ in range(MUTATIONS):
        one = copy.deepcopy(record)
        exchanged = {}
        if rng.random() < 0.2:
            exchanged["adapter_config"] = json.dumps(changed(config, rng)).encode()
            one["files"]["adapter_config.json"] = hashlib.sha256(exchanged["adapter_config"]).hexdigest()
        else:
            one = changed(one, rng)
        snapshot, reference = offered(**exchanged, onebase=raw(one, rng))
        monkeypatch.setattr(published, "_snapshot", lambda *_, found=snapshot: found)
        tree = tree_of(tiny_base, reference)
        tree["stages"]["sft"]["data"] = {"path": str(data)}
        try:
            recipe = build(tree)
            recipe.parts()
            published.load_words(reference)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and "\x1b" not in str(error)
        else:
            accepted += 1
            noted = _note_parent(recipe.parent_artifacts("sft")["policy"])
            lineage = ancestors(tmp_path / "runs", {"policy": noted})
            told = replace(honest[0], lineage=lineage, artifact=Artifact(tmp_path / "runs" / "sft"))
            for tells in (card._lineage, card._cost, card._hub_datasets, measured.table):
                tells(told)
    assert listing(tmp_path) == before
    assert 20 < accepted < MUTATIONS // 2, "most mutations are to be refused, but not all"


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """All there is outside of the cache and of what was offered."""
    below = [path for path in folder.iterdir() if path.name not in ("cache", "hub")]
    found = [*below, *(path for above in below for path in above.rglob("*"))]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}
