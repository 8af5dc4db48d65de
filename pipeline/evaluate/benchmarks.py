"""Standard benchmarks: tasks of EleutherAI's lm-eval, an optional extra, asked of the policies on the bench.

lm-eval makes the prompts and the scores, with its own settings and without the chat template; answers are kept item by
item, so that intervals and changes are those of every other measure here.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import yaml

from pipeline.data.contracts import Row
from pipeline.disk.atomic import Json, sha256_of_file
from pipeline.errors import UserError
from pipeline.evaluate.measure import Measure
from pipeline.evaluate.stored import Compared
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

AT_ONCE = 16
STANDARD_ERRORS = 1.96
RESAMPLES = 1000
FILE_KEYS = ("include", "dataset_path", "data_files", "data_dir")


def source(task: str) -> Row:
    """What a task's results depend on besides the policy: lm-eval's version and, for a task file, every file it names.

    task: a name that lm-eval knows, or a YAML file.  Raises UserError if lm-eval or the file is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs a further package: pip install 'onebase[lm-eval]'")
    files = {}
    if task.endswith((".yaml", ".yml")):
        if not Path(task).is_file():
            raise UserError(f"--lm-eval {task}: no such file")
        files = {str(path): sha256_of_file(path) for path in sorted(set(_files(Path(task))))}
    return {"task": task, "lm_eval": version("lm_eval"), "files": files}


def label(task: str) -> str:
    """A task's name within the name of a file."""
    return re.sub(r"[^\w.]", "_", Path(task).stem if task.endswith((".yaml", ".yml")) else task)


class _Loader(yaml.SafeLoader):
    """Reads task files without loading the functions they name."""


_Loader.add_multi_constructor("!", lambda loader, tag, node: {"!function": loader.construct_scalar(node)})


def _files(task: Path) -> Iterator[Path]:
    """A task file, the files it includes, the code it calls, and its data where that lies on this machine."""
    yield task
    try:
        tree = yaml.load(task.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--lm-eval {task} cannot be read: {error}") from error

    def walk(value: Any, key: str) -> Iterator[Path]:
        if isinstance(value, dict):
            for inner, below in value.items():
                yield from walk(below, inner if inner in (*FILE_KEYS, "!function") else key)
        elif isinstance(value, list):
            for below in value:
                yield from walk(below, key)
        elif isinstance(value, str) and key == "!function":
            yield from task.parent.glob(f"{value.rpartition('.')[0]}.py")
        elif isinstance(value, str) and key == "include":
            yield from (path for path in (task.parent / value, Path(value)) if path.is_file())
        elif isinstance(value, str) and key:
            at = Path(value)
            named = at.rglob("*") if at.is_dir() else at.parent.glob(at.name) if at.name else ()
            yield from (path for path in named if path.is_file())

    for path in walk(tree, ""):
        if path != task:
            yield from _files(path) if path.suffix in (".yaml", ".yml") else (path,)


@functools.cache
def _manager() -> Any:
    """What knows lm-eval's tasks; it reads thousands of files to learn them."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def loadable(tasks: list[str]) -> None:
    """Load every task with its data, before any model is. Raises UserError."""
    for task in tasks:
        try:
            _manager().load([task])
        except KeyError:
            raise UserError(
                f"--lm-eval {task}: lm-eval has no task of that name (`lm-eval ls tasks` lists them); the name of a "
                "task file ends in .yaml"
            ) from None
        except Exception as error:  # whatever a data set, a task's code or the network has to say
            raise UserError(f"--lm-eval {task} cannot be loaded: {type(error).__name__}: {error}") from error


class Benchmark(Measure):
    """By task (or group of tasks): `n`, and for each metric lm-eval's `value` and `stderr`, whether `higher` is better,
    and the value of every item where lm-eval's is their mean."""

    @property
    def task(self) -> str:
        return str(self.rows[0]["task"])

    @property
    def name(self) -> str:
        return f"lm_eval-{label(self.task)}"

    def take(self, bench: Bench) -> Json:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        from pipeline.models.base import computing

        with bench.acting_as(self.subject), computing(bench.model):
            model = HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, batch_size=AT_ONCE)
            found = lm_eval.simple_evaluate(
                model, tasks=[self.task], task_manager=_manager(), bootstrap_iters=RESAMPLES, log_samples=True
            )
        parts = found.get("group_subtasks") or {}
        below = {name for names in parts.values() for name in names}
        return {name: _of(found, name, parts) for name in found["results"] if name not in below}


def _of(found: Json, name: str, parts: Json) -> Json:
    tasks = _leaves(name, parts)
    samples = [sample for task in tasks for sample in found["samples"].get(task, [])]
    metrics: Json = {}
    for key, value in found["results"][name].items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        items = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        whole = all(isinstance(item, int | float) for item in items) and items
        stderr = found["results"][name].get(f"{metric}_stderr,{chosen}")
        higher = [found["higher_is_better"].get(task, {}).get(metric) for task in (name, *tasks)]
        metrics[metric if chosen == "none" else f"{metric}, {chosen}"] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
            "higher": next((bool(known) for known in higher if known is not None), True),
            "items": [float(item) for item in items] if whole and abs(numpy.mean(items) - value) < 1e-9 else None,
        }
    return {"n": len({(sample["doc_id"], sample["doc_hash"]) for sample in samples}), "metrics": metrics}


def _leaves(name: str, parts: Json) -> list[str]:
    return [leaf for part in parts.get(name) or [] for leaf in _leaves(part, parts)] or [name]


def compared(values: list[tuple[str, Json]], parents: dict[str, str]) -> list[Compared]:
    """For each task and metric every policy's number with its interval, and each stage's change from its parent.

    values: the policy of each benchmark and what was taken.  parents: the policy that each stage goes on from.
    """
    by_task: dict[str, dict[str, Json]] = {}
    for policy, value in values:
        for name, found in value.items():
            by_task.setdefault(name, {})[policy] = found
    rows = []
    for name, held in by_task.items():
        first = next(iter(held.values()))
        for metric, known in first["metrics"].items():
            of_each = {policy: found["metrics"][metric] for policy, found in held.items()}
            items = {policy: found["items"] for policy, found in of_each.items()}
            shares = all(of is not None and min(of) >= 0 and max(of) <= 1 for of in items.values())
            rows.append(
                Compared(
                    task=name,
                    metric=metric,
                    n=first["n"],
                    better="higher" if known["higher"] else "lower",
                    percent=shares,
                    numbers={policy: _estimate(value, first["n"], shares) for policy, value in of_each.items()},
                    changes={
                        stage: intervals.difference(items[stage], items[parent], 1.0 if shares else None)
                        for stage, parent in parents.items()
                        if items.get(stage) and items.get(parent)
                    },
                )
            )
    return rows


def _estimate(found: Json, n: int, shares: bool) -> Estimate:
    """From the items where they are known, else from lm-eval's standard error; without one there is no interval."""
    items, value, stderr = found["items"], found["value"], found["stderr"]
    if items:
        whole = set(items) <= {0.0, 1.0}
        made = intervals.mean if not shares else intervals.proportion if whole else intervals.share
        return made(items)
    if stderr is None:
        return Estimate(value, None, None, n, "")
    room = STANDARD_ERRORS * stderr
    return Estimate(value, value - room, value + room, n, "standard error")
