"""Trackers are told what metrics.jsonl holds, once, by every stage; read back by their own readers."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from conftest import tiny_tree, write_recipe

from pipeline.disk import metrics
from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.recipe.recipe import Recipe, build, read
from pipeline.runs.stage import run_stage
from pipeline.runs.states import states
from pipeline.stages.check import check_trackers
from pipeline.training import trainer
from pipeline.training.progress import Progress
from pipeline.training.trackers import Trackers

Told = dict[int, dict[str, Any]]
"""By step, what a tracker was told."""
TWICE = 3
"""The step after which the sft stage of the chain below is stopped. Its checkpoint is of the step before, so that this
one is computed twice."""
TO_BOTH = {"report_to": ["trackio", "tensorboard"]}


@pytest.fixture(scope="module")
def trackio_folder() -> Path:
    for package in ("trackio", "tensorboard"):
        pytest.importorskip(package, reason="pip install -e '.[dev]'")
    return Path(os.environ["TRACKIO_DIR"])


class Dies(Progress):
    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_log(args, state, control, **kwargs)
        if state.global_step == TWICE:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def chain(tiny_base: Path, trackio_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """sft, which is stopped and goes on from a checkpoint, then ppo; both told to two trackers."""
    folder = tmp_path_factory.mktemp("chain")
    (folder / "pays.py").write_text(
        "def length(completions, **_): return [len(one[0]['content']) for one in completions]\n"
        "def a(completions, **_): return [one[0]['content'].count('a') for one in completions]\n"
    )
    tree = tiny_tree(tiny_base, folder, "tracked")
    tree["train"] |= TO_BOTH
    sft = tree["stages"]["sft"]
    del sft["from"]
    paid = [{"source": f"{folder}/pays.py:length"}, {"source": f"{folder}/pays.py:a", "weight": 0.5}]
    tree["stages"] = {
        "sft": sft,
        "ppo": {
            "from": "sft", "reward": paid, "data": {"path": "data/prompts.jsonl", "test": 0.05},
            "train": {"steps": 4, "batch_size": 6, "per_device_train_batch_size": 3, "response_length": 12,
                      "save_steps": 3, "kl_stop": 1e6},
        },
    }  # fmt: skip
    recipe = read(write_recipe(tree, folder / "recipe.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Progress", Dies)
        with pytest.raises(KeyboardInterrupt):
            run_stage(recipe, "sft", folder)
    for stage in ("sft", "ppo"):
        run_stage(recipe, stage, folder)
    return recipe, folder


def run_of(out: Artifact) -> str:
    return str(out.tracked()["run"])


def by_trackio(out: Artifact) -> tuple[Told, dict[str, list[dict[str, Any]]]]:
    """By step the numbers, and the rows of each table, as its own database has them."""
    from trackio.sqlite_storage import SQLiteStorage

    numbers: Told = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for log in SQLiteStorage.get_logs("tracked", run_of(out)):
        step = log.pop("step")
        del log["timestamp"]
        for name, value in log.items():
            if isinstance(value, dict):
                tables.setdefault(name, []).extend(value["_value"])
            else:
                assert name not in numbers.get(step, {}), f"step {step} is told {name} twice"
                numbers.setdefault(step, {})[name] = value
    return numbers, tables


def by_tensorboard(out: Artifact) -> tuple[Told, dict[str, list[str]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = out.folder.parent / "trackers" / "tensorboard" / run_of(out)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    numbers: Told = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in numbers.get(event.step, {}), f"step {event.step} is told {name} twice"
            numbers.setdefault(event.step, {})[name] = event.value
    texts = {
        name.removesuffix("/text_summary"): [
            event.tensor_proto.string_val[0].decode() for event in events.Tensors(name)
        ]
        for name in events.Tags()["tensors"]
    }
    return numbers, texts


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_trackers_hold_what_metrics_jsonl_and_the_manifest_hold(chain: tuple[Recipe, Path], stage: str) -> None:
    out = chain[0].artifact(stage, chain[1])
    expected: Told = {}
    for line in metrics.read(out.metrics):
        expected.setdefault(line.pop("step"), {}).update(line)
    manifest = out.finished()
    last = max(expected)
    assert list(expected) == list(range(1, last + 1)) and last > TWICE
    expected[last] |= {f"before/{name}": value for name, value in manifest.before.items()}
    expected[last] |= {f"after/{name}": value for name, value in manifest.after.items()}
    told, in_float32 = by_trackio(out)[0], by_tensorboard(out)[0]
    if stage == "sft":  # TRL counts the tokens of an attempt; what is told is the first one's, what is kept the last's
        counts = [each[TWICE].pop("num_tokens") for each in (told, in_float32, expected)]
        assert counts[0] == counts[1] > counts[2]
    assert told == expected
    assert in_float32.keys() == expected.keys()
    for step, values in expected.items():
        assert in_float32[step] == pytest.approx(values, rel=1e-6)


def test_rollouts_are_tables_whose_means_are_the_metrics(chain: tuple[Recipe, Path]) -> None:
    out = chain[0].artifact("ppo", chain[1])
    rows = by_trackio(out)[1]["rollouts"]
    lines = {line["step"]: line for line in metrics.read(out.metrics)}
    sources = [f"score/{term.source}" for term in chain[0].stages["ppo"].reward_terms()]
    assert [row["step"] for row in rows] == [step for step in (1, 3, 4) for _ in range(6)]
    for step in (1, 3, 4):
        of_step = [row for row in rows if row["step"] == step]
        for name in ("score", *sources, "reward", "kl", "answer_length"):
            mean = statistics.fmean(row[name] for row in of_step)
            assert mean == pytest.approx(lines[step][name], rel=1e-5, abs=1e-6), name
        assert statistics.fmean(row["ended"] for row in of_step) == pytest.approx(lines[step]["eos_share"])
        assert [row[sources[0]] for row in of_step] == [len(row["answer"]) for row in of_step]
    told = by_tensorboard(out)[1]["rollouts"]
    assert len(told) == 3 and all(text.count("\n") == 7 for text in told)


def test_runs_are_linked_to_those_they_go_on_from(chain: tuple[Recipe, Path]) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    sft, ppo = (chain[0].artifact(stage, chain[1]) for stage in ("sft", "ppo"))
    noted = SQLiteStorage.get_run_config("tracked", run_of(ppo))
    assert noted["parents.policy.run"] == run_of(sft)
    assert noted["parents.policy.fingerprint"] == sft.finished().fingerprint
    assert noted["fingerprint"] == ppo.finished().fingerprint and noted["section.train.steps"] == 4
    assert len(SQLiteStorage.get_runs("tracked")) == 2  # the stopped attempt and the one that went on are one run
    shown = by_tensorboard(ppo)[1]["config"][0]
    assert f"| parents.policy.run | {run_of(sft)} |" in shown
    samples = [json.loads(line) for line in sft.samples.read_text(encoding="utf-8").splitlines()]
    assert [row["after"] for row in by_trackio(sft)[1]["samples"]] == [sample["after"] for sample in samples]


def test_another_tracker_makes_no_stage_stale(chain: tuple[Recipe, Path]) -> None:
    recipe, folder = chain
    tree = {**recipe.tree, "train": {**recipe.tree["train"], "report_to": "none", "run_name": "other"}}
    assert [state.word for state in states(build(tree), folder)] == ["fresh", "fresh"]


def test_a_tracker_that_fails_is_told_no_more_and_the_others_are(
    trackio_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PartialState(cpu=True)  # as a worker has by then
    out = Artifact(tmp_path / "broken" / "sft")
    (out.folder.parent / "trackers").mkdir(parents=True)
    (out.folder.parent / "trackers" / "tensorboard").write_text("no folder")
    trackers = Trackers()
    trackers.start(out, TO_BOTH, {})
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    said = capsys.readouterr().out
    assert said.count("warning: tensorboard is told no more of this stage: ") == 1
    assert f"tracked by trackio as {run_of(out)}" in said

    from trackio.sqlite_storage import SQLiteStorage

    assert [log["loss"] for log in SQLiteStorage.get_logs("broken", run_of(out))] == [0.5]


def test_a_tracker_that_is_not_known_or_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree: dict[str, Any] = {
        "name": "t", "model": {"base": "x"},
        "stages": {"sft": {"data": {"path": "data/demonstrations.jsonl"}, "train": {"report_to": "trakio"}}},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"stages\.sft\.train\.report_to: there is no tracker 'trakio'.*'trackio'"):
        read(write_recipe(tree, tmp_path / "r.yaml"))
    tree["train"] = {"report_to": ["mlflo"]}
    with pytest.raises(UserError, match=r"r\.yaml:\d+: train\.report_to: there is no tracker 'mlflo'"):
        read(write_recipe(tree, tmp_path / "r.yaml"))
    tree["train"] = {}
    tree["stages"]["sft"]["train"]["report_to"] = ["wandb", "all"]
    with pytest.raises(UserError, match="report_to: says 'all' beside others"):
        build(tree)
    tree["stages"]["sft"]["train"]["report_to"] = ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.report_to: wandb is not installed.*pip install wandb"):
        check_trackers(build(tree).stages)
    tree["stages"]["sft"]["train"]["report_to"] = "none"
    check_trackers(build(tree).stages)
