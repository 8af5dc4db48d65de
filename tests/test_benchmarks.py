"""onebase eval --lm-eval: tasks from local files without a network, kept as measures like all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tree
from test_evaluation import finished

from pipeline.errors import UserError
from pipeline.evaluate import benchmarks, evaluation
from pipeline.evaluate.bench import Bench
from pipeline.models.base import computing
from pipeline.recipe.recipe import build

TASK = """\
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [even, odd]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def test_a_local_task_equals_a_plain_loop_and_is_kept_while_nothing_changes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra: pip install 'onebase[lm-eval]'")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {"sft": {**tree["stages"]["sft"], "from": None}}
    recipe, runs = build(tree), tmp_path / "runs"
    finished(recipe, runs)
    asked = [{"question": f"Is {n} even or odd? It is", "label": n % 2} for n in range(12)]
    data, task = tmp_path / "parity.jsonl", tmp_path / "parity.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in asked))
    task.write_text(TASK.format(data=data))

    evaluation.evaluate(recipe, runs, tasks=[str(task)])
    (row,) = evaluation.results_of(recipe, runs).benchmarks
    assert (row.task, row.metric, row.n) == ("parity", "acc", 12)
    bench = Bench(recipe.spec.model, {"sft": recipe.artifact("sft", runs).adapter}, {}, 1.0)
    for policy in ("base", "sft"):
        right = sum(likeliest(bench, policy, row.question) == row.label for row in asked)
        # bfloat16 rounds differently in batches, which may turn one close call
        assert abs(row.numbers[policy].value - right / 12) <= 1 / 12 + 1e-9, policy

    taken: list[str] = []
    monkeypatch.setattr(evaluation, "take", lambda recipe, runs, missing: taken.extend(m.file for m in missing))
    evaluation.evaluate(recipe, runs)
    assert taken == [] and evaluation.results_of(recipe, runs).benchmarks == [row]
    data.write_text(data.read_text() + json.dumps(asked[0]) + "\n")
    evaluation.evaluate(recipe, runs)
    assert evaluation.results_of(recipe, runs).benchmarks == [] and "left out" in capfd.readouterr().out


def likeliest(bench: Bench, policy: str, question: str) -> int:
    totals = []
    for choice in (" even", " odd"):
        before, after = bench.tokenizer(question)["input_ids"], bench.tokenizer(question + choice)["input_ids"]
        with bench.acting_as(policy), torch.no_grad(), computing(bench.model):
            logp = torch.log_softmax(bench.model(input_ids=torch.tensor([after])).logits[0].float(), -1)
        totals.append(sum(logp[place - 1, after[place]].item() for place in range(len(before), len(after))))
    return int(totals[1] > totals[0])


def test_what_a_task_file_names_counts_for_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluate.benchmarks.version", lambda name: "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    (tmp_path / "shared.yaml").write_text("output_type: generate_until\n")
    (tmp_path / "ways.py").write_text("def shown(row):\n    return row['q']\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "aside.txt").write_text("not named\n")
    task = tmp_path / "mine.yaml"
    data = f"dataset_kwargs: {{data_files: {{test: {tmp_path}/*.jsonl}}}}"
    task.write_text(f"task: mine\ninclude: shared.yaml\n{data}\ndoc_to_text: !function ways.shown\n")
    named = {Path(path).name for path in benchmarks.source(str(task))["files"]}
    assert named == {"mine.yaml", "shared.yaml", "ways.py", "rows.jsonl"}
    with pytest.raises(UserError, match="no such file"):
        benchmarks.source(str(tmp_path / "absent.yaml"))


def test_numbers_of_a_benchmark() -> None:
    """Items give intervals and paired changes; without them lm-eval's standard error does, or nothing."""

    def metric(value: float, stderr: float | None, items: list[float] | None) -> dict[str, Any]:
        return {"n": 40, "metrics": {"m": {"value": value, "stderr": stderr, "higher": True, "items": items}}}

    before, after = [1.0, 0.0] * 20, [1.0] * 30 + [0.0] * 10
    values = [
        ("base", {"a": metric(0.5, 0.1, before)}),
        ("sft", {"a": metric(0.75, 0.1, after)}),
        ("base", {"b": metric(12.0, 2.0, None)}),
        ("base", {"c": metric(3.0, None, None)}),
    ]
    a, b, c = benchmarks.compared(values, {"sft": "base"})
    assert a.percent and a.numbers["sft"].value == 0.75 and a.changes["sft"].value == 0.25
    assert a.numbers["base"].low == pytest.approx(0.3519, abs=1e-3)  # Wilson, 20 of 40
    assert (b.numbers["base"].low, b.numbers["base"].high) == pytest.approx((8.08, 15.92))
    assert c.numbers["base"].low is None and not b.percent
