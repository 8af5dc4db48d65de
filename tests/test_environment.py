"""Whoever imports OneBase keeps the environment they had; the processes it starts get one of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from pipeline.language.say import speak
from pipeline.runs.environment import CPU_ENVIRONMENT, EVERYWHERE, GPU_ENVIRONMENT, complete_own, make_environment

OURS = {**EVERYWHERE, **CPU_ENVIRONMENT, **GPU_ENVIRONMENT}

IMPORTED = """
import importlib, os, pkgutil
before = dict(os.environ)
from pipeline import read, run
assert callable(read) and callable(run), run
assert dict(os.environ) == before, "by the two functions"
import pipeline
for module in pkgutil.walk_packages(pipeline.__path__, "pipeline."):
    if module.name not in ("pipeline.__main__", "pipeline.publish.trained", "pipeline.publish.readback"):
        importlib.import_module(module.name)
from pipeline import run as again
assert again is run
print([name for name in OURS if os.environ.get(name) != before.get(name)])
"""


def test_importing_changes_nothing_in_the_environment() -> None:
    bare = {name: value for name, value in os.environ.items() if name not in OURS}
    code = IMPORTED.replace("OURS", repr(list(OURS)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_child_gets_what_it_needs_and_what_the_person_has_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: value for name, value in os.environ.items() if name not in OURS}
    monkeypatch.setattr(os, "environ", {**own, "TRANSFORMERS_VERBOSITY": "info"})
    child = make_environment()
    assert child["TRANSFORMERS_VERBOSITY"] == "info"
    assert child["HF_HUB_DISABLE_TELEMETRY"] == "1" and child["OMP_WAIT_POLICY"] == "passive"
    assert os.environ == {**own, "TRANSFORMERS_VERBOSITY": "info"}
    complete_own(EVERYWHERE)
    assert os.environ == {**own, **EVERYWHERE, "TRANSFORMERS_VERBOSITY": "info"}


def test_a_child_speaks_the_language_that_its_parent_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_LANG", "zh")
    assert make_environment()["ONEBASE_LANG"] == "en"
    speak("zh")
    try:
        child = make_environment()
    finally:
        speak("en")
    for module, words in (("runs.worker", ["no-such.yaml", "sft"]), ("evaluate.process", ["no-such.yaml"])):
        code = (
            f"import sys; from pipeline.{module} import main; from pipeline.language.say import spoken\n"
            f"sys.argv[1:] = {words}\ntry:\n    main()\nfinally:\n    print(spoken())"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=child, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout.split() == ["zh"], done.stderr


def test_a_worker_started_by_hand_completes_its_own_environment() -> None:
    code = (
        "import os, sys, pipeline.runs.worker as worker; sys.argv = ['worker', 'no-such.yaml', 'sft']\n"
        "try:\n    worker.main()\n"
        "finally:\n    print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['TRANSFORMERS_VERBOSITY'])"
    )
    bare = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 2 and "no-such.yaml" in done.stderr
    assert done.stdout.split() == ["1", "error"]
