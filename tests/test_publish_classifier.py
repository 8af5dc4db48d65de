"""A classifier is published with the names of its labels, and transformers alone gives them back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from publish_run import finished_run, having_pulled
from transformers import pipeline

from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.record import RECORD, Record, read
from pipeline.publish import gate
from pipeline.publish.publishing import publish
from pipeline.publish.sealed import read_sealed
from pipeline.recipe.recipe import Recipe

LABELS = ["praise", "blame or worse", "neither"]
TEXT = "Some text."
Run = tuple[Recipe, Path]


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A sealed reward stage that becomes a classifier: three labels, and an adapter that shows."""
    runs = tmp_path_factory.mktemp("runs")
    recipe = finished_run(tiny_base, runs, "pretrain", "sft", "reward")
    artifact, model = recipe.artifact("reward", runs), recipe.spec.model
    torch.manual_seed(0)
    base = bases.load_base(model, bases.load_tokenizer(model), num_labels=len(LABELS))
    classifier = adapters.fresh(base, model.lora, head=True)
    with torch.no_grad():
        for weight in adapters.trainable(classifier).values():
            weight.normal_(std=0.1)
    manifest = artifact.finished()
    shutil.move(artifact.folder, runs / "old")
    shutil.copytree(runs / "old" / "adapter", artifact.adapter)
    adapters.save(classifier, artifact.adapter)
    Artifact(artifact.folder).seal(manifest.model_copy(update={"labels": LABELS}))
    return recipe, runs


@pytest.fixture(scope="module")
def published(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for form in ("adapter", "merged"):
        publish(run[0], "reward", str(folder / form), form, runs=run[1])
    return folder


@pytest.fixture(scope="module")
def probabilities(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the trained classifier says of TEXT."""
    source, out = read_sealed(run[0], "reward", run[1]), tmp_path_factory.mktemp("trained") / "out"
    job = gate._job(source, "adapter", out) | {"rows": [{"text": TEXT}]}
    scores = torch.from_numpy(gate._run("trained", job, out)["numbers"]["0"])
    assert scores.shape == (len(LABELS),)
    return dict(zip(LABELS, scores.softmax(-1).tolist(), strict=True))


def by_label(answer: list[dict[str, Any]]) -> dict[str, float]:
    return {one["label"]: one["score"] for one in answer}


def test_the_pipeline_of_transformers_loads_a_merged_classifier(
    published: Path, probabilities: dict[str, float]
) -> None:
    config = json.loads((published / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": LABELS[0], "1": LABELS[1], "2": LABELS[2]}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["problem_type"] == "single_label_classification"
    classify = pipeline("text-classification", model=str(published / "merged"))
    assert by_label(classify(TEXT, top_k=None)) == pytest.approx(probabilities, abs=0.01)
    assert classify(TEXT)[0]["label"] == max(probabilities, key=lambda label: probabilities[label])
    batch = classify([TEXT, "Another text, which is longer than the first one is."], top_k=None, batch_size=2)
    assert by_label(batch[0]) == pytest.approx(probabilities, abs=0.01)


CARD = """
import contextlib, io, json, re
import bitsandbytes.nn.modules as layers
layers.has_avx512bf16 = lambda: False  # its repacked weights do not fit a base this small
code = re.findall("```python\\n(.*?)```", open("adapter/README.md").read(), re.DOTALL)
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec("\\n".join(code), {})
print(json.dumps([eval(line) for line in said.getvalue().splitlines()]))
"""


def test_what_the_card_of_an_adapter_says_to_type_gives_the_labels(
    published: Path, run: Run, probabilities: dict[str, float], tmp_path: Path
) -> None:
    environment = having_pulled(Path(run[0].spec.model.base), tmp_path)
    command = [sys.executable, "-I", "-c", CARD]
    done = subprocess.run(command, capture_output=True, text=True, cwd=published, env=environment)
    assert done.returncode == 0, done.stderr
    exact, rounded = json.loads(done.stdout.splitlines()[-1])
    assert exact == probabilities
    assert by_label(rounded) == pytest.approx(probabilities, abs=0.01)
    for form in ("adapter", "merged"):
        card = (published / form / "README.md").read_text()
        assert "A classifier: the stage" in card and "pipeline_tag: text-classification" in card
        assert "`blame or worse`" in card and "reward model" not in card and "reward-model" not in card


def test_a_record_keeps_the_labels(published: Path) -> None:
    record = json.loads((published / "adapter" / RECORD).read_text())
    assert record["load"]["labels"] == record["lineage"][-1]["labels"] == LABELS
    assert read(published / "adapter" / RECORD, RECORD, Record, "hub:a/b").manifest("a/b@c").labels == LABELS


def test_labels_by_other_names_are_named(published: Path, run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(published / "merged", tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "neither", "1": "blame or worse", "2": "praise"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(gate.Broken, match=r"the labels are named \['neither'.*, in training \['praise'"):
        gate.check(read_sealed(run[0], "reward", run[1]), "merged", folder)


def test_gguf_has_no_place_for_a_classifier(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'reward' is a classifier; GGUF has no place for a score head"):
        publish(run[0], "reward", str(tmp_path / "x"), "gguf", runs=run[1])
