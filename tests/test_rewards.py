"""The reward functions that come with OneBase: they pay what their libraries' own examples say, and no answer can cheat
or harm."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_tree, write_recipe

from pipeline.disk import metrics
from pipeline.errors import UserError
from pipeline.ppo import comparing, unit_tests
from pipeline.ppo.shipped import SHIPPED
from pipeline.recipe.recipe import build, read
from pipeline.runs.rows import load_rows
from pipeline.runs.stage import run_stage


def pay(name: str, answers: list[str], **columns: list[Any]) -> list[float]:
    """As TRL would call it with conversations."""
    return SHIPPED[name](completions=[[{"role": "assistant", "content": answer}] for answer in answers], **columns)


def test_math_pays_what_math_verify_and_trl_document(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("math_verify")
    documented = [  # README of math-verify; TRL's accuracy_reward
        ("${1,3} \\cup {2,4}$", "${1,2,3,4}$", 1),
        (r"\frac{1}{3}", r"My answer is \boxed{\frac{1}{3}}", 1),
        (r"\frac{1}{3}", r"My answer is \boxed{\frac{1}{2}}", 0),
    ]
    hedges = [("7", r"\boxed{7} or \boxed{8}", 0), ("7", r"\boxed{\{7,8\}}", 0), ("7", "7 or 8 or 9", 0), ("7", "", 0)]
    rows = [
        *documented,
        *hedges,
        (7, "so it is 7.", 1),
        ("x^2+1", r"\boxed{1+x^2}", 1),
        ("7", "<think>7</think> 8", 0),
    ]
    # A formula is no text in which a number is to be found; a text is.
    rows += [(r"2\sqrt{3}", "$2$", 0), (r"2\sqrt{3}", r"\boxed{2\sqrt{3}}", 1), ("3x+2", "3", 0), ("3x+2", "$2+3x$", 1)]
    rows += [("10^{5}", "10", 0), ("10^{5}", "100000", 1), ("2.5e3", "2.5", 0), ("2.5e3", "2500", 1)]
    rows += [(r"(-\infty, 3]", "3", 0), ("1{,}000", "1000", 1), ("1,234", "1234", 1), ("1/2", "0.5", 1)]
    rows += [("He has 3 dogs, so it is 7", "7", 1), ("3*2=6.\n#### 6", "6", 1), ("7 cm", "7", 1), ("x=5", "5", 1)]
    assert pay("math", [said for _, said, _ in rows], answer=[gold for gold, _, _ in rows]) == [n for *_, n in rows]
    # Where a row has no `answer`, its `solution` counts.
    assert pay("math", ["7", "7"], answer=[None, "8"], solution=["7", "7"]) == [1, 0]
    # What no machine can compute is ended, and the next answer is compared as before.
    monkeypatch.setattr(comparing, "SECONDS", 1)
    assert pay("math", ["$9^{9^{9}}$", "7"], answer=["7", "7"]) == [0, 1]


def test_exact_and_fuzzy() -> None:
    pytest.importorskip("rapidfuzz")
    said = ["  paris. ", "Paris it is", "1.5", "15", "ﬁne", "Ｐａｒｉｓ", "hm</think>Paris"]
    right = ["Paris", "Paris", "15", 15, "fine", "Paris", "Paris"]
    assert pay("exact", said, answer=right) == [1, 0, 0, 1, 1, 1, 1]
    # README of rapidfuzz: fuzz.ratio("this is a test", "this is a test!") is 96.55
    near, same = pay("fuzzy", ["this is a test", "x"], answer=["this is a test!", "x"])
    assert near == pytest.approx(0.9655, abs=1e-4) and same == 1


def test_json_schema_pays_what_jsonschema_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    documented = {"type": "object", "properties": {"price": {"type": "number"}, "name": {"type": "string"}}}
    said = ['{"name": "Eggs", "price": 34.99}', '{"name": "Eggs", "price": "Invalid"}']  # README of jsonschema
    said += ['```json\n{"price": 1}\n```', '{"price": NaN}', '{"price": 1e999}', '{"price": "a", "price": 1}', "{"]
    said += ['{"price": 1} and more', "[" * 100_000, ""]
    assert pay("json_schema", said, schema=[documented] * len(said)) == [1, 0, 1] + [0] * (len(said) - 3)
    monkeypatch.setattr(comparing, "SECONDS", 1)
    slow = {"type": "string", "pattern": "^(a+)+$"}
    assert pay("json_schema", [json.dumps("a" * 40 + "!"), '"aa"'], schema=[json.dumps(slow)] * 2) == [0, 1]


HUMAN_EVAL = (  # openai/human-eval, HumanEval/0, with the call that the row's entry_point stands for
    "def check(candidate):\n"
    "    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True\n"
    "    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False\n"
    "check(has_close_elements)"
)
CLOSE = (
    "from typing import List\n"
    "def has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
    "    for idx, elem in enumerate(numbers):\n"
    "        for idx2, elem2 in enumerate(numbers):\n"
    "            if idx != idx2 and abs(elem - elem2) < threshold:\n"
    "                return True\n"
    "    return False\n"
)
MBPP = [  # google-research/mbpp, task 3
    "assert is_not_prime(2) == False",
    "assert is_not_prime(10) == True",
    "assert is_not_prime(35) == True",
]
CASES = (
    "import unittest\nfrom solution import f\nclass Case(unittest.TestCase):\n"
    "    def test_double(self):\n        self.assertEqual(f(2), 4)\n"
)
DOUBLE = "def f(x): return 2 * x"
STACK = "class Stack(list):\n    def push(self, x): self.append(x)\n    def twice(self):\n        yield from self * 2"


def test_code_passes_the_tests_of_known_data_sets_and_forms() -> None:
    prime = "import math\ndef is_not_prime(n): return any(n % i == 0 for i in range(2, int(math.sqrt(n)) + 1))"
    rows = [
        (CLOSE, HUMAN_EVAL, 1), (CLOSE.replace("< threshold", "<= 9"), HUMAN_EVAL, 0), (prime, MBPP, 1),
        (DOUBLE, CASES, 1), ("def f(x): return x", CASES, 0), (DOUBLE, CASES + "unittest.main()", 1),
        ("def f(x): return x", CASES + "unittest.main(exit=False)", 0),
        (DOUBLE, "def test_f():\n    assert f(2) == 4", 1), (DOUBLE, "def test_f():\n    assert f(2) == 5", 0),
        ("def f(x): x.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]", 1),
        ("def f(x): x.sort()", "a = [2, 1]\nf(x=a)\nassert a == [1, 2]", 1),
        ("def sum(x): return 4", "from solution import sum\nassert sum([2]) == 4", 1),
        ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}", 1),
        (STACK, "s = Stack()\ns.push(3)\nassert list(s.twice()) == [3, 3]\nassert s[0] == 3", 1),
    ]  # fmt: skip
    said = [f"It is:\n```python\n{code}\n```\nand so on" for code, _, _ in rows]
    assert pay("unit_tests", said, tests=[tests for _, tests, _ in rows]) == [passes for *_, passes in rows]


def test_no_code_cheats_its_tests_or_harms_the_machine(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("here")
    tests_file = tmp_path / "tests.py"
    tests_file.write_text("assert f(2) == 4")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0)
    address = b"\2\0" + server.getsockname()[1].to_bytes(2, "big") + b"\x7f\0\0\1" + bytes(8)
    tries = "def f(x):\n    import sys, os\n    posix = sys.modules['posix']\n    {}\n    return 4\nf(2)\n"
    attempts = [
        "posix.fork()", f"posix.unlink({str(kept)!r})", f"posix.open({str(tests_file)!r}, 0)",
        "posix.kill(0, 9)", "posix.execv('/bin/true', ['true'])", "posix.mkdir('/tmp/made-by-an-answer')",
        "os.posix_spawn('/bin/true', ['true'], {})", f"open({str(kept)!r}, 'w')", "import socket",
        "import _thread; _thread.start_new_thread(print, ())",
        f"import ctypes\n    c = ctypes.CDLL(None)\n    assert c.connect(c.socket(2, 1, 0), {address!r}, 16) == 0",
    ]  # fmt: skip
    cheats = [
        "import os\nos._exit(0)", "raise SystemExit(0)", "print('passed')", "", "def f(",
        "def f(x):\n    while True: print('passed')",
        "class Yes:\n    def __eq__(self, other): return True\n    __contains__ = __eq__\ndef f(x): return Yes()",
        "def all(x): return True\nisinstance = any = all\ndef f(x): return None",
        "__builtins__['all'] = lambda x: True\ndef f(x): return 0",
        "import unittest\nunittest.TestCase.assertEqual = print\nAssertionError = Warning\ndef f(x): return 0",
        "def f(x):\n    raise __import__('unittest').SkipTest('no')",
        "def f(x): return 'a' * (1 << 40)",
        "import sys\ndef f(x):\n    sys.modules['posix'].write(3, b'\\0' * 8)",
    ]  # fmt: skip
    hard = ["assert all([f(2) == 4])"]
    programs = [tries.format(attempt) for attempt in attempts] + cheats
    assert unit_tests.pass_tests(programs, [hard] * len(programs)) == [0] * len(programs)
    # Nor does the code say what a built-in one or a module means to the tests.
    named = [("def abs(x): return 0\ndef f(x): return 9.0", "from solution import *\nassert abs(f(2) - 4) < 1e-6")]
    named += [("class math: isclose = max\ndef f(x): return 9.0", "assert math.isclose(f(2), 4.0)")]
    assert unit_tests.pass_tests(*map(list, zip(*named, strict=True))) == [0, 0]
    # The same programs pass without the attempt, so it is the attempt that fails.
    assert unit_tests.pass_tests([tries.format("pass")], [hard]) == [1]
    assert kept.read_text() == "here" and not os.path.exists("/tmp/made-by-an-answer")
    with pytest.raises(BlockingIOError):  # nobody has called
        server.accept()


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("exact", {}, "the reward exact needs the column answer"),
        ("math", {"other": "1"}, "needs the column answer or solution"),
        ("math", {"answer": "\\text{}"}, "holds no mathematics"),
        ("math", {"answer": "two"}, "is a word"),
        ("exact", {"answer": "."}, "'answer' is empty"),
        ("exact", {"answer": ["a"]}, "neither a text nor a number"),
        ("json_schema", {"schema": {"type": "nothing"}}, "is not a JSON schema: 'nothing' is not valid"),
        ("json_schema", {"schema": {"$ref": "http://127.0.0.1:9/schema"}}, "is not a JSON schema: Unresolvable"),
        ("json_schema", {"schema": {}}, "expected an object that demands something"),
        ("unit_tests", {"tests": "assert f("}, "is not Python code"),
        ("unit_tests", {"tests": HUMAN_EVAL.rpartition("\n")[0]}, "runs nothing"),
        ("unit_tests", {"tests": "f(2)"}, "asserts nothing"),
        ("unit_tests", {"tests": "def check(f):\n    assert f(2) == 4\nprint(f(2))"}, "asserts nothing that is run"),
        (
            "unit_tests",
            {"tests": "class TestF:\n    def test(self): assert f(2) == 4\nf(2)"},
            "class TestF, which nothing",
        ),
        ("unit_tests", {"tests": "async def test_f():\n    assert f(2) == 4"}, "async test_f(), which nothing awaits"),
        ("unit_tests", {"tests": "import numpy\nassert f(2) == 4"}, "imports numpy"),
        ("unit_tests", {"tests": "def test_f(f):\n    assert f(2) == 4"}, "test_f() with arguments"),
    ],
)
def test_rows_that_cannot_be_paid_are_named_before_a_run(
    tiny_base: Path, tmp_path: Path, name: str, row: dict[str, Any], said: str
) -> None:
    if name == "math":
        pytest.importorskip("math_verify")
    good = {"prompt": "p", "answer": "1", "schema": {"type": "object"}, "tests": "assert f(2) == 4"}
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({'prompt': 'q', **row})}\n")
    tree = tiny_tree(tiny_base, tmp_path)
    tree |= {"stages": {"grpo": {"reward": name, "data": {"path": str(tmp_path / "p.jsonl")}}}, "train": {}}
    with pytest.raises(UserError) as caught:
        load_rows(build(tree), "grpo")
    assert str(caught.value).startswith(f"{tmp_path}/p.jsonl:2: ") and said in str(caught.value)


def test_recipes_that_cannot_be_paid_are_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"]["ppo"] = {"data": {"path": "data/prompts.jsonl"}}
    monkeypatch.setitem(SHIPPED, "math", replace(SHIPPED["math"], library="no-such-library"))
    for reward, said in (
        ("math", "math needs no-such-library: pip install 'onebase[rewards]'"),
        ("exakt", "did you mean 'exact'"),
        ([{"source": "exact", "weight": 0}], "pays nothing"),
        ([{"source": "fuzzy", "truth": True}], "fuzzy pays shares from 0 to 1"),
    ):
        if "fuzzy" in str(reward):
            monkeypatch.setitem(SHIPPED, "fuzzy", replace(SHIPPED["fuzzy"], library=""))
        tree["stages"]["ppo"]["reward"] = reward
        with pytest.raises(UserError, match=r"recipe.yaml:\d+: stages.ppo") as caught:
            read(write_recipe(tree, tmp_path / "recipe.yaml"))
        assert said in str(caught.value)
    tree["stages"]["exact"] = {**tree["stages"]["reward"], "kind": "reward"}
    tree["stages"]["ppo"]["reward"] = "exact"
    with pytest.raises(UserError, match="stages.exact: is the name of a reward function that comes with OneBase"):
        read(write_recipe(tree, tmp_path / "recipe.yaml"))


def test_a_stage_is_paid_by_them_and_measured_on_held_out_rows(tiny_base: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"Say {n}", "answer": n, "schema": {"type": "integer"}}) for n in range(8)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    tree = tiny_tree(tiny_base, tmp_path)
    reward = [{"source": "json_schema"}, {"source": "exact", "weight": 0, "truth": True}]
    grpo = {"reward": reward, "data": {"path": str(tmp_path / "p.jsonl"), "test": 0.25}}
    grpo["train"] = {"max_steps": 1, "num_generations": 2, "generation_batch_size": 4, "max_completion_length": 4}
    tree |= {"stages": {"grpo": grpo}, "train": {}}
    recipe = build(tree)
    assert recipe.parents("grpo") == {}
    run_stage(recipe, "grpo", tmp_path / "runs")
    (step,) = metrics.read(recipe.artifact("grpo", tmp_path / "runs").metrics)
    assert {"score/json_schema", "score/exact"} <= step.keys()
    after = recipe.artifact("grpo", tmp_path / "runs").finished().after
    assert {"reward/json_schema", "reward/exact", "reward/exact_gain_low"} <= after.keys()
    # A function that would pay otherwise makes the stage stale.
    before = recipe.parts()["grpo"]
    SHIPPED["exact"], kept = replace(SHIPPED["exact"], arithmetic=2), SHIPPED["exact"]
    try:
        assert recipe.parts()["grpo"] != before
    finally:
        SHIPPED["exact"] = kept
