"""Five answers make a recipe that is sound and fits; what is answered badly is asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import head, typed

from pipeline.bring.init import Given, start
from pipeline.errors import UserError
from pipeline.recipe.recipe import read
from pipeline.runs.rows import load_rows

DATA = {"follow": "demonstrations.jsonl", "prefer": "comparisons.jsonl", "corpus": "corpus.jsonl"}
STAGES = {
    "follow": ["sft"],
    "prefer": ["sft", "dpo"],
    "classify": ["classify"],
    "corpus": ["pretrain"],
    "chain": ["sft", "reward", "dpo", "ppo"],
}


def labelled(folder: Path, rows: int = 60) -> Path:
    path = folder / "texts.jsonl"
    texts = [{"text": f"text {number} about {number % 7}", "label": "ab"[number % 2]} for number in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    return path


def data_for(goal: str, folder: Path) -> str:
    if goal == "classify":
        return str(labelled(folder))
    return head(DATA.get(goal, DATA["prefer"]), 40, folder / "rows.jsonl")


@pytest.mark.parametrize("goal", STAGES)
def test_each_goal_gives_a_recipe_that_is_sound_and_fits(
    goal: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = data_for(goal, tmp_path)
    words = ["--base", str(tiny_base), "--data", data, "--card", "8GB", "--goal", goal, "--yes"]
    printed = typed("init", "mine.yaml", *words)
    assert "mine.yaml is written" in printed
    assert f"sound, {len(STAGES[goal])} stage" in typed("check", "mine.yaml")
    planned = typed("plan", "mine.yaml", "--gpu", "8GB")
    assert [line.split()[1:] for line in planned.splitlines() if line.startswith("fits")] == [
        ["yes"] * len(STAGES[goal])
    ]
    recipe = read(tmp_path / "mine.yaml")
    assert recipe.name == "mine" and recipe.order() == STAGES[goal]
    for stage in recipe.order():
        rows, _ = load_rows(recipe, stage)
        assert rows.train and rows.test


def test_a_folder_gives_each_stage_the_files_made_for_it(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in ("corpus.jsonl", "demonstrations.jsonl", "comparisons.jsonl", "prompts.jsonl"):
        head(file, 30, folder / file)
    (folder / "notes.json").write_text("{}", encoding="utf-8")
    start(tmp_path / "mine.yaml", Given(str(tiny_base), str(folder), "8GB", "chain"), asking=False, force=False)
    recipe = read(tmp_path / "mine.yaml")
    assert recipe.order() == ["pretrain", "sft", "reward", "dpo", "ppo"]
    taken = {name: Path(str(stage.data.path)).stem for name, stage in recipe.stages.items()}
    assert taken == {
        "pretrain": "corpus",
        "sft": "demonstrations",
        "reward": "comparisons",
        "dpo": "comparisons",
        "ppo": "prompts",
    }


def test_files_of_no_use_are_left_out_of_a_mixture(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in ("demonstrations.jsonl", "demonstrations_test.jsonl"):
        head(file, 12, folder / file)
    given = Given(str(tiny_base), str(folder), "8GB")
    start(tmp_path / "mine.yaml", given, asking=False, force=False)
    assert read(tmp_path / "mine.yaml").stages["sft"].data.path == str(folder)
    (folder / "notes.json").write_text("{}", encoding="utf-8")
    start(tmp_path / "mine.yaml", given, asking=False, force=True)
    parts = read(tmp_path / "mine.yaml").stages["sft"].data.parts()
    assert [Path(part.path).stem for part in parts] == ["demonstrations", "demonstrations_test"]


def test_a_rare_class_is_not_held_out_whole(tiny_base: Path, tmp_path: Path) -> None:
    path = labelled(tmp_path)
    with path.open("a", encoding="utf-8") as file:
        for letter in "cdefghijklmnop":
            file.write(json.dumps({"text": f"only {letter}", "label": letter}) + "\n")
    start(tmp_path / "mine.yaml", Given(str(tiny_base), str(path), "8GB"), asking=False, force=False)
    assert read(tmp_path / "mine.yaml").stages["classify"].data.test is None
    assert "none held out" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


def test_answers_with_thumbs_give_kto_on_what_sft_learnt_from_the_good_ones(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}.", "label": n % 3 > 0} for n in range(60)]
    path = tmp_path / "thumbs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    start(tmp_path / "mine.yaml", Given(str(tiny_base), str(path), "8GB"), asking=False, force=False)
    recipe = read(tmp_path / "mine.yaml")
    assert [(name, recipe.stages[name].from_) for name in recipe.order()] == [("sft", None), ("kto", "sft")]
    for name, count, labels in (("sft", 40, {None}), ("kto", 60, {True, False})):
        taken, _ = load_rows(recipe, name)
        assert taken.test and len(taken.train) + len(taken.test) == count
        assert {row.get("label") for row in taken.train} == labels


def test_bad_answers_are_asked_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = data_for("prefer", tmp_path)
    typed = iter([
        "", "no/such/file.jsonl", data, "chian", "classify", "", "4711", "german", "rtx9999", "rtx3060",
        "nowhere", str(tiny_base),
    ])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda question: next(typed))
    start(tmp_path / "mine.yaml", Given(), asking=True, force=False)
    said = capsys.readouterr().out
    for reason in (
        "no such file",
        "did you mean 'chain'",
        "takes rows like",
        "is not the name of a language",
        "--card rtx9999",
    ):
        assert reason in said
    assert "nowhere is no local folder" in said
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert "in German" in text and "--gpu rtx3060" in text
    assert read(tmp_path / "mine.yaml").order() == ["sft", "dpo"]  # told by the rows, which are comparisons
    assert next(typed, None) is None


def test_answers_that_end_too_soon_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    with pytest.raises(UserError, match="Give it as --data"):
        start(tmp_path / "mine.yaml", Given(), asking=True, force=False)
    with pytest.raises(UserError, match="--data is missing"):
        start(tmp_path / "mine.yaml", Given(), asking=False, force=False)
    assert not (tmp_path / "mine.yaml").exists()


def test_a_file_that_is_there_stays_unless_forced(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine\n", encoding="utf-8")
    given = Given(str(tiny_base), data_for("follow", tmp_path), "none")
    with pytest.raises(UserError, match="--force"):
        start(file, given, asking=False, force=False)
    assert file.read_text(encoding="utf-8") == "mine\n"
    start(file, given, asking=False, force=True)
    assert read(file).order() == ["sft"]


def test_unfit_rows_and_few_rows_are_told(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a few: rows.jsonl"  # a name that YAML would read as a mapping
    rows = [{"prompt": f"q{number}", "completion": "a"} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "x", "completion": ""}]))
    start(tmp_path / "mine.yaml", Given(str(tiny_base), str(path), "8GB"), asking=False, force=False)
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert f"1 unfit are left out (first {path}:4: field 'completion' is empty)" in text
    assert "runs/mine/sft/refused.jsonl" in text and "too few to hold some out" in text
    assert read(tmp_path / "mine.yaml").stages["sft"].data.on_bad_row == "skip"


TABLES = [
    ("frage;antwort\nq;a\n", "utf-8", "has the columns frage, antwort. Needed are: for sft prompt and completion"),
    ("prompt,response\nq,a\n", "utf-8", "rename 'response' to 'completion'"),
    ("question,answer\nq,schön\n", "latin-1", "not UTF-8 .*data.encoding.*--encoding"),
]


@pytest.mark.parametrize(("text", "encoding", "reason"), TABLES)
def test_a_table_that_cannot_be_used_is_told_by_its_columns(
    text: str, encoding: str, reason: str, tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "faq.csv").write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=reason):
        start(
            tmp_path / "mine.yaml", Given(str(tiny_base), str(tmp_path / "faq.csv"), "none"), asking=False, force=False
        )


def test_a_table_with_semicolons_capitals_and_an_encoding_is_read(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faq.csv").write_bytes("Question;Answer\nWann, bitte?;Um neun. Schön!\n".encode("latin-1"))
    given = Given(str(tiny_base), str(tmp_path / "faq.csv"), "none", encoding="latin-1")
    start(tmp_path / "fragen und 行.yaml", given, asking=False, force=False)
    assert "The run is named 'fragen-und'" in capsys.readouterr().out
    recipe = read(tmp_path / "fragen und 行.yaml")
    assert recipe.name == "fragen-und"
    (row,) = load_rows(recipe, "sft")[0].train
    assert (row["prompt"][0]["content"], row["completion"][0]["content"]) == ("Wann, bitte?", "Um neun. Schön!")


def test_rows_inside_an_object_are_told(tmp_path: Path) -> None:
    for text in ('{"data": [{"prompt": "a"}]}', '{\n "data": [\n  {"prompt": "a"}]\n}'):
        (tmp_path / "w.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="with the rows inside it under 'data'"):
            start(tmp_path / "m.yaml", Given("", str(tmp_path / "w.json")), asking=False, force=False)


def test_rows_that_the_template_cannot_render_are_told(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"q{n}"}], "completion": f"<|im_end|>{n}"[10 * (n > 0) :]}
        for n in range(9)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({**row, "completion": [{"role": "assistant", "content": row["completion"]}]}) + "\n"
            for row in rows
        )
    )
    start(tmp_path / "mine.yaml", Given(str(tiny_base), str(path), "8GB"), asking=False, force=False)
    assert "cannot render are left out" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert read(tmp_path / "mine.yaml").stages["sft"].data.on_bad_row == "skip"


@pytest.mark.parametrize(
    "name", ["a, b", "x: y", "#1", "null", "1e-5", "caf\u00e9 \U0001f600", "line\u2028break", "{a}", "'q'"]
)
def test_any_name_is_written_as_it_is(name: str, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(Path(data_for("follow", tmp_path)).read_bytes())
    start(tmp_path / "mine.yaml", Given(str(tiny_base), str(path), "8GB"), asking=False, force=False)
    assert read(tmp_path / "mine.yaml").stages["sft"].data.path == str(path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    given = Given("Qwen/Qwen3-32B", data_for("follow", tmp_path), "8GB")
    with pytest.raises(UserError, match="8 GB"):
        start(tmp_path / "mine.yaml", given, asking=False, force=False)
    assert not (tmp_path / "mine.yaml").exists()


@pytest.mark.parametrize("card", ["8GB", "12GB", "24GB"])
@pytest.mark.parametrize("language", ["English", "German"])
def test_the_base_that_is_proposed_fits_the_card(card: str, language: str, tmp_path: Path) -> None:
    given = Given(data=data_for("chain", tmp_path), card=card, goal="chain", language=language)
    start(tmp_path / "mine.yaml", given, asking=False, force=False)
    assert ("SmolLM" in read_base(tmp_path)) is (card == "8GB" and language == "English")


def read_base(folder: Path) -> str:
    return read(folder / "mine.yaml").spec.model.base


def test_a_classifier_is_asked_in_the_language_of_its_texts(tiny_base: Path, tmp_path: Path) -> None:
    given = Given(str(tiny_base), str(labelled(tmp_path)), "8GB", language="german")
    start(tmp_path / "mine.yaml", given, asking=False, force=False)
    assert "Welches Etikett" in str(read(tmp_path / "mine.yaml").tree["stages"]["classify"]["instruction"])


@pytest.fixture(autouse=True)
def _no_card_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("pipeline.plan.cards.detect_card", lambda: None)
    yield
