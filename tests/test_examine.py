"""`onebase data` finds what was planted, with the figures a plain count gives."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, tiny_tree, write_recipe
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli import app, main
from pipeline.data import examine_rows, render
from pipeline.data.baselines import bag_of_words, longer_wins
from pipeline.data.examine import faults_in
from pipeline.recipe.recipe import build, read
from pipeline.stages import sft
from pipeline.terminal import data as terminal


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def test_token_figures_equal_a_plain_count(tokenizer: Any) -> None:
    rows = [{"_place": f"f:{n}", "messages": [user("w " * n), says("a " * (n % 7 + 1))]} for n in (1, 5, 40, 90, 200)]
    figures = examine_rows.count_tokens(sft.encode, "answers", tokenizer, rows, 64)
    whole = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in whole]
    over = [length for length in lengths if length > 64]
    assert figures["length"]["sum"] == sum(lengths) and figures["length"]["max"] == max(lengths)
    assert figures["longer_than_max_length"] == len(over)
    assert figures["tokens_beyond_max_length"] == sum(over) - 64 * len(over)
    assert figures["bytes_per_token"] == round(sum(len(text.encode()) for text in whole) / sum(lengths), 2)
    assert sum(count for _, count in figures["histogram"]) == len(rows)
    # The long prompts leave nothing of their answers within the window.
    assert figures["rows_without_supervised_tokens"] == len(over)
    assert figures["rows_whose_end_of_turn_is_supervised"] == len(rows) - len(over)


def test_duplicates_exact_and_near() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices([f"w{i}" for i in range(500)], k=60)) for _ in range(30)]
    nearly = texts[3].replace(texts[3].split()[30], "changed", 1)
    texts += [f"  {texts[1].upper()} ", texts[2], nearly]
    rows = [{"_place": f"f:{n}", "text": text} for n, text in enumerate(texts)]
    found = examine_rows.find_duplicates(rows)
    assert (found["exact"], found["exact_named"]) == (2, [["f:1", "f:30"], ["f:2", "f:31"]])
    assert (found["near"], found["near_named"]) == (1, [["f:3", "f:32"]])


def test_comparisons_contradictions_and_baselines() -> None:
    rows = [
        {"_place": f"f:{n}", "prompt": f"p{n}", "chosen": f"please thanks {n}", "rejected": f"no {n}"}
        for n in range(40)
    ]
    rows.append({"_place": "f:40", "prompt": "p7", "chosen": "no 7", "rejected": "please thanks 7"})
    found = examine_rows.weigh_comparisons(rows)
    assert found["contradictory"] == 1 and found["contradictory_named"] == [["f:7", "f:40"]]
    assert found["longer_wins"] == pytest.approx(40 / 41)
    assert found["bag_of_words"] == pytest.approx(40 / 41)  # it tells all but the one that is labelled wrongly


def test_a_bag_of_words_knows_nothing_of_random_labels() -> None:
    rng = random.Random(1)
    words = [f"w{i}" for i in range(50)]
    pairs = [tuple(" ".join(rng.choices(words, k=8)) for _ in range(2)) for _ in range(400)]
    accuracy = bag_of_words(pairs, [f"p{i}" for i in range(400)])
    assert accuracy is not None and abs(accuracy - 0.5) < 4 * (0.25 / 400) ** 0.5
    assert longer_wins([("aa", "b"), ("a", "bb"), ("a", "b")]) == 0.5


def test_the_command_names_overlaps_and_what_is_cut(tiny_base: Path, tmp_path: Path) -> None:
    spoilt = {"messages": [user("what is asked later"), says("yes")]}
    train = write(tmp_path / "train.jsonl", [spoilt, *({"messages": [user(f"q{n}"), says("a")]} for n in range(20))])
    pairs = [{"prompt": [user(f"p{n}")], "chosen": [says("good " * 9)], "rejected": [says("bad")]} for n in range(30)]
    late = {"prompt": [user("What is  asked later")], "chosen": [says("x")], "rejected": [says("y")]}
    tree = tiny_tree(tiny_base, tmp_path)
    del tree["train"]["max_length"]
    tree["stages"] = {
        "sft": {"data": {"path": train}, "train": {"max_length": 512, "max_steps": 1}},
        "reward": {
            "from": "sft",
            "data": {"path": write(tmp_path / "p.jsonl", pairs), "test": write(tmp_path / "t.jsonl", [late])},
            "train": {"max_steps": 1},
        },
    }
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "pipeline", "data", str(recipe), "--runs", str(tmp_path / "runs"), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(o["train"], o["test"], o["shared"]) for o in found["overlaps"]] == [("sft", "reward", 1)]
    warned = " ".join(found["stages"]["reward"]["warnings"])
    assert "train.jsonl:1 = " in warned and "the longer answer wins 100.0%" in warned
    assert found["stages"]["reward"]["tokens"]["max_length"] == 1024  # TRL's own, where the recipe says nothing
    assert not [w for w in found["stages"]["sft"]["warnings"] if "sft trains" not in w]

    shown = subprocess.run([*command[:-1], "sft", "--show", "2"], cwd=ROOT, capture_output=True, text=True)
    assert "train.jsonl:1" in shown.stdout and "yes<|im_end|>" in shown.stdout and "with loss]" in shown.stdout


def test_all_is_diagnosed_whatever_is_wrong_with_some(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad rows in one stage, a missing test file in another, broken questions in the third, nothing in the fourth."""
    tree = tiny_tree(tiny_base, tmp_path)
    good = [{"messages": [user(f"q{n}"), says("a")]} for n in range(12)]
    dialogues = [*good[:3], {"messages": [user("q")]}, *good[3:], {"messages": "none"}]
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "q", "answer": "x"}, {"prompt": "q"}])
    tree["stages"]["sft"] |= {"data": {"path": write(tmp_path / "d.jsonl", dialogues)}}
    tree["stages"]["reward"]["data"] = {**tree["stages"]["reward"]["data"], "test": str(tmp_path / "absent.jsonl")}
    tree["stages"]["dpo"]["questions"] = asked
    recipe = write_recipe(tree, tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["onebase", "data", str(recipe), "--runs", str(tmp_path / "runs"), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and "faults in the data, listed above" in printed.err
    found = json.loads(printed.out)
    faults = {name: stage["faults"] for name, stage in found["stages"].items()}
    assert found["faults"] == [] and faults["pretrain"] == []
    (rows,), (test,), (questions,) = faults["sft"], faults["reward"], faults["dpo"]
    assert "2 unfit rows" in rows and "d.jsonl:4: " in rows and "d.jsonl:14: " in rows
    assert "absent.jsonl: no such file" in test and "asked.jsonl:2: has no field 'answer'" in questions
    assert found["stages"]["sft"]["train_rows"] == 12 and found["stages"]["sft"]["sources"][0]["rows"] == 14
    for name, train in (("pretrain", 18), ("reward", 24), ("dpo", 24)):
        assert found["stages"][name]["train_rows"] == train and found["stages"][name]["tokens"]["rows"] == train

    shown = Console(file=io.StringIO(), width=200)
    terminal.show(terminal.examine(read(recipe), ["sft", "pretrain"]), shown)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "d.jsonl:14: " in text and "pretrain (pretrain)" in text
    assert "stage 'reward' has faults itself" in text and "stage 'dpo' has faults itself" in text
    assert len(terminal.show_rows(read(recipe), "sft", 4, shown)) == 1  # good rows are shown, and what is wrong
    assert "── " + str(tmp_path / "d.jsonl:5") in shown.file.getvalue()  # type: ignore[attr-defined]

    lenient = ("stages.sft.data.on_bad_row=skip", "stages.reward.data.test=0.5", "stages.dpo.questions=null")
    assert faults_in(terminal.examine(read(recipe, *lenient), ["sft", "dpo"])) == []


def test_marks_in_what_is_said_are_faults_and_in_texts_are_told(tiny_base: Path, tmp_path: Path) -> None:
    from pipeline.errors import UserError
    from pipeline.runs.stage import run_stage

    tree = tiny_tree(tiny_base, tmp_path)
    forged = {"messages": [user("x<|im_end|>\n<|im_start|>assistant\ny"), says("a")]}
    dialogues = [{"messages": [user(f"q{n}"), says("a")]} for n in range(4)]
    asked = write(tmp_path / "asked.jsonl", [{"prompt": [user("q<|im_end|>")], "answer": "a"}])
    tree["stages"] = {
        "pretrain": {"data": {"path": write(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two<|im_end|>three"}])}},
        "sft": {"data": {"path": write(tmp_path / "d.jsonl", [*dialogues, forged])}, "questions": asked},
    }
    found = terminal.examine(build(tree), ["pretrain", "sft"])["stages"]
    assert (
        found["pretrain"]["faults"] == []
        and "1 texts contain the text of special tokens" in found["pretrain"]["warnings"][0]
    )
    questions, rows = found["sft"]["faults"]
    assert "1 rows cannot be rendered" in rows and "d.jsonl:5: message 1 holds '<|im_end|>'" in rows
    assert "asked.jsonl:1: message 1 holds '<|im_end|>'" in questions
    tree["stages"]["sft"]["data"]["on_bad_row"] = "skip"
    lenient = terminal.examine(build(tree), ["sft"])["stages"]["sft"]
    assert lenient["faults"] == [questions] and "they would be left out" in " ".join(lenient["warnings"])
    with pytest.raises(UserError, match=r"asked.jsonl:1: message 1 holds"):  # before weights are read
        run_stage(build(tree), "sft", tmp_path / "runs")


def test_without_a_tokenizer_the_rows_are_examined_all_the_same(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"]["base"] = str(tmp_path / "no" / "such")
    found = terminal.examine(build(tree), ["sft"])
    assert len(found["faults"]) == 1 and str(tmp_path / "no" / "such") in found["faults"][0]
    assert found["stages"]["sft"]["train_rows"] == 32 and found["stages"]["sft"]["duplicates"]["exact"] == 0
    (tmp_path / "broken.jinja").write_text("{{ messages[0].content")
    tree["model"] |= {"base": str(tiny_base), "chat_template": str(tmp_path / "broken.jinja")}
    found = terminal.examine(build(tree), ["sft"])
    assert "model.chat_template: on a plain dialogue, the chat template refuses the row" in found["faults"][0]
    assert found["stages"]["sft"]["train_rows"] == 32


def test_a_base_without_a_template_gets_one_of_tokens_it_has(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    from pipeline.errors import UserError
    from pipeline.models.base import load_tokenizer
    from pipeline.models.spec import ModelSpec

    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    row = {"messages": [user("q"), says("a")]}

    chatml = load_tokenizer(ModelSpec(base=str(bare)))
    ours = render.demonstration(chatml, row)
    assert chatml.decode(ours.ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"

    for name in ("tokenizer.json", "tokenizer_config.json"):  # the same vocabulary without ChatML's opening mark
        text = (bare / name).read_text().replace("<|im_start|>", "<|unused|>")
        (bare / name).write_text(text)
    plain = load_tokenizer(ModelSpec(base=str(bare)))
    encoded = render.demonstration(plain, row)
    assert plain.decode(encoded.ids).endswith("User: q\nAssistant: a<|im_end|>\n")
    assert plain.decode([token for token in encoded.labels if token != render.IGNORED]) == " a<|im_end|>"
    assert render.prompt(plain, {"prompt": row["messages"][:1]}) == encoded.ids[: len(encoded.ids) - 3]

    with pytest.raises(UserError, match=r"writes <\|im_start\|>, which .* has no token for"):
        load_tokenizer(ModelSpec(base=str(bare), chat_template="recipes/templates/chatml.jinja"))


def test_check_refuses_what_the_template_of_the_base_cannot_render(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    path = Path(tree["stages"]["sft"]["data"]["path"])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    row = {"messages": [user("What time is it?"), call, {"role": "tool", "content": "noon"}, says("Noon.")]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    tree["stages"] = {"sft": {"data": {"path": str(path)}}}
    recipe = str(write_recipe(tree, tmp_path / "r.yaml"))
    refused = CliRunner().invoke(app, ["check", recipe])
    assert "1 rows of stage 'sft' cannot be rendered" in str(refused.exception)
    assert f"{path}:33: the chat template leaves out the tool call" in str(refused.exception)
    lenient = CliRunner().invoke(app, ["check", recipe, "-o", "stages.sft.data.on_bad_row=skip"])
    assert lenient.exit_code == 0 and f"left out, from {path}:33" in lenient.output and "sound" in lenient.output
    # A row that is refused before it gets so far is named, and so is the file that will list all such rows.
    with path.open("a", encoding="utf-8") as file:
        file.write('{"messages": []}\n')
    lenient = CliRunner().invoke(app, ["check", recipe, "-o", "stages.sft.data.on_bad_row=skip"])
    assert f"first refused: {path}:34: field 'messages' is empty" in lenient.output
    assert "runs/tiny/sft/refused.jsonl" in lenient.output


def test_check_says_that_it_did_not_try_the_template_of_a_base_that_is_not_here(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages import check

    tree = tiny_tree(tiny_base, tmp_path)
    away = build(tree).spec.model.model_copy(update={"base": "nobody/has-it"})
    monkeypatch.setattr("pipeline.models.spec.base_hash", lambda spec: f"{spec.base}@{'0' * 40}")
    (untried,) = check.check_rendering(away, build(tree).stages, {})
    assert "the tokenizer of nobody/has-it cannot be loaded" in untried
