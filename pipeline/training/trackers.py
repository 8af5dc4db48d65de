"""Trackers: trackio, wandb, tensorboard or mlflow, as `report_to` names them, are told of a stage's training.

Every stage tells them the same: the lines of metrics.jsonl as they are written, tables of answers, and the held-out
numbers before and after. accelerate's trackers pass it on; transformers' own reports stay off. A tracker that fails is
told no more, and the training goes on. Nothing is imported before a tracker is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.disk import metrics
from pipeline.disk.artifact import Artifact
from pipeline.disk.atomic import Json
from pipeline.language.say import say

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = ("trackio", "wandb", "tensorboard", "mlflow")
FOLDER = "trackers"
"""In the run's folder: what tensorboard, wandb and mlflow keep on this machine."""


def chosen(report_to: str | list[str] | None) -> list[str]:
    """The trackers that `report_to` names, read as transformers does: one, a list, all that are installed, or none."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    if names == ["all"]:
        return list(filter(installed, TRACKERS))
    return [] if names == ["none"] else list(dict.fromkeys(names))


def installed(tracker: str) -> bool:
    found = importlib.util.find_spec(tracker)
    return found is not None and found.origin is not None  # wandb leaves a folder of its own name, which is no package


class Trackers:
    """Those that are told of one stage. Nobody is in a process that is not the first, or before `start`."""

    def __init__(self) -> None:
        self.open: list[GeneralTracker] = []
        self.told = 0
        """The last step of which an earlier attempt has told already."""

    def start(self, out: Artifact, train: Json, config: Json) -> None:
        """Begin a run in each tracker that the stage's `train:` names, or go on with the one of an attempt that was
        stopped. `config`: what a tracker notes of the run besides.

        A resumed run computes the steps after its checkpoint again. They have been told, so they are not told twice.
        """
        names = chosen(train.get("report_to"))
        if not names:
            return
        former = out.tracked()
        run = former.get("run") or _name_run(train.get("run_name") or out.name)
        if former:
            self.told = max([former["told"], *(row["step"] for row in metrics.read(out.metrics))])
        project, folder = train.get("project") or out.folder.parent.name, out.folder.parent
        known: Json = {**former, "run": run, "told": self.told}
        noted = dict(_flatten({"stage": out.name, "run": run, **config}))
        for name in names:
            with self._guarded(name), contextlib.redirect_stdout(sys.stderr):  # what it says goes to the log
                tracker = _make(name, project, folder, known, noted, train)
                tracker.start()
                self.open.append(tracker)
                if name == "mlflow":
                    known["mlflow"] = tracker.tracker.info.run_id
                if name not in former.get("in", []):
                    _note_config(tracker, noted)
        known["in"] = [tracker.name for tracker in self.open]
        out.note_tracked(known)
        if self.open:
            told = say(
                "tracked by {names} as {run} in the project {project}",
                names=", ".join(known["in"]),
                run=run,
                project=project,
            )
            print(f"  {told}", flush=True)

    def log(self, step: int, values: Json) -> None:
        if step > self.told:
            self._tell(lambda tracker: tracker.log(values, step=step))

    def tell_table(self, name: str, step: int, rows: list[Json]) -> None:
        """Rows of one table, which grows with each step."""
        if step > self.told:
            self._tell_rows(name, step, rows)

    def tell_result(self, step: int, before: Json, after: Json, samples: list[Json]) -> None:
        """The held-out numbers before and after the stage, and some answers, at its last step."""
        values = {f"before/{name}": value for name, value in before.items()}
        values |= {f"after/{name}": value for name, value in after.items()}
        self._tell(lambda tracker: tracker.log(values, step=step))
        self._tell_rows("samples", step, samples)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._tell(_finish)
        self.open.clear()

    def _tell_rows(self, name: str, step: int, rows: list[Json]) -> None:
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            data = [[step, *(_cell(row.get(key)) for key in columns)] for row in rows]
            self._tell(lambda tracker: _write_table(tracker, name, step, ["step", *columns], data))

    def _tell(self, tell: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.open):
            with self._guarded(tracker.name):
                tell(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # another program's, which can fail in any way
            self.open = [tracker for tracker in self.open if tracker.name != name]
            problem = " ".join(str(error).split())[:300]
            print(f"  warning: {name} is told no more of this stage: {type(error).__name__}: {problem}", flush=True)


def _name_run(stem: str) -> str:
    when = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', stem)[:60]}-{when}-{secrets.token_hex(2)}"


def _make(name: str, project: str, folder: Path, known: Json, config: Json, train: Json) -> GeneralTracker:
    """A tracker that keeps to this machine unless it is told, or has been set up, to send elsewhere. `folder`: of the
    run of all stages, whose name groups them."""
    from accelerate import tracking

    run, local = known["run"], folder.resolve() / FOLDER
    if name == "trackio":
        space = train.get("trackio_space_id")
        private = train.get("hub_private_repo", True) if space else None
        return tracking.TrackioTracker(
            project, name=run, group=folder.name, config=config, resume="allow", space_id=space, private=private
        )
    local.mkdir(exist_ok=True)
    if name == "wandb":
        return tracking.WandBTracker(
            project, id=run, name=run, group=folder.name, config=config, resume="allow", dir=str(local)
        )
    if name == "tensorboard":
        return tracking.TensorBoardTracker(run, local / "tensorboard")
    artifacts = None
    if "MLFLOW_TRACKING_URI" not in os.environ:
        import mlflow

        artifacts = (local / "mlflow").as_uri()
        mlflow.set_tracking_uri(f"sqlite:///{local / 'mlflow.db'}")
    return tracking.MLflowTracker(project, artifacts, run_id=known.get("mlflow"), run_name=run)


def _note_config(tracker: GeneralTracker, config: Json) -> None:
    """Of a new run; trackio and wandb have got it with its name."""
    if tracker.name == "mlflow":
        tracker.store_init_configuration(config)
    elif tracker.name == "tensorboard":
        _write_table(tracker, "config", 0, ["word", "value"], [[word, _cell(value)] for word, value in config.items()])


def _write_table(tracker: GeneralTracker, name: str, step: int, columns: list[str], data: list[list[Any]]) -> None:
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Table(columns, data)}, step=step)
    elif tracker.name == "wandb":
        tracker.log_table(name, columns, data, step=step)
    elif tracker.name == "tensorboard":
        rows = [columns, ["---"] * len(columns), *data]
        lines = (" | ".join(str(value).replace("|", "\\|").replace("\n", "<br>") for value in row) for row in rows)
        tracker.log({name: "\n".join(f"| {line} |" for line in lines)}, step=step)
    else:
        import mlflow

        mlflow.log_table(dict(zip(columns, map(list, zip(*data, strict=True)), strict=True)), f"{name}.json")


def _finish(tracker: GeneralTracker) -> None:
    if tracker.name == "trackio":
        import trackio

        # What the tracker itself calls leaves it to be finished again at the end of the process.
        trackio.finish()  # type: ignore[no-untyped-call]
    else:
        tracker.finish()


def _cell(value: Any) -> str | int | float | None:
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def _flatten(tree: Json, place: str = "") -> Iterator[tuple[str, Any]]:
    """By dotted key, lists as text, without what says nothing."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{place}{key}.")
        elif value is not None:
            yield f"{place}{key}", _cell(value)
