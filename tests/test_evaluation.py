"""onebase eval on a tiny run: every policy is itself, measures equal a plain loop, what is fresh is not taken again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, head, seal, tiny_tree
from test_arena import line

from pipeline.data import render
from pipeline.data.load import read_source
from pipeline.data.tokens import stop_ids
from pipeline.errors import UserError
from pipeline.evaluate import evaluation, measures, verdicts
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.plan import _finished, learnt, own_judges, plan
from pipeline.measure.ranking import over_longer
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.base import computing
from pipeline.models.dialogue import Told
from pipeline.models.sampling import Episode, sample
from pipeline.ppo import loop, rewards
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.rows import load_rows


def finished(recipe: Recipe, runs: Path) -> None:
    """Every stage's folder with an adapter of its own, random instead of trained: evaluation must tell them apart."""
    spec = recipe.spec.model
    tokenizer = bases.load_tokenizer(spec)
    for seed, name in enumerate(recipe.order()):
        reward = not recipe.kind(name).answers
        torch.manual_seed(seed)
        model = adapters.fresh(bases.load_base(spec, tokenizer, num_labels=int(reward)), spec.lora, head=reward)
        with torch.no_grad():
            for weight in adapters.trainable(model).values():
                weight.copy_(torch.randn_like(weight) * 0.05)
        artifact = recipe.artifact(name, runs)
        artifact.adapter.mkdir(parents=True)
        adapters.save(model, artifact.adapter)
        tokenizer.save_pretrained(artifact.adapter)
        seal(recipe, name, runs, {})


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluation")
    tree = tiny_tree(tiny_base, folder)
    tree["stages"]["dpo"]["questions"] = tree["stages"]["sft"]["questions"]
    recipe, runs = build(tree), folder / "runs"
    finished(recipe, runs)
    return recipe, runs, tree


@pytest.fixture(scope="module")
def bench(run: tuple[Recipe, Path, dict[str, Any]]) -> Iterator[Bench]:
    recipe, runs, _ = run
    folders = {name: recipe.artifact(name, runs).adapter for name in recipe.order()}
    reward = {"reward": folders.pop("reward")}
    with Bench(recipe.spec.model, folders, reward, 1.0).ready() as ready:
        yield ready


def test_every_policy_on_the_bench_is_the_one_on_disk(run: tuple[Recipe, Path, dict[str, Any]], bench: Bench) -> None:
    """Losses of rows one by one, from a model loaded for this policy alone."""
    recipe, runs, _ = run
    rows = (load_rows(recipe, "pretrain")[0].test or [])[:3]
    losses = {}
    for policy in ("base", "pretrain", "sft", "dpo"):
        found = measures.CorpusLoss(policy, rows).take(bench)
        losses[policy] = sum(found["nats"])
        model: Any = bases.load_base(recipe.spec.model, bench.tokenizer)
        if policy != "base":
            model = adapters.carried(model, recipe.artifact(policy, runs).adapter)
        for row, nats, tokens in zip(rows, found["nats"], found["tokens"], strict=True):
            ids = torch.tensor([render.document(bench.tokenizer, row["text"]).ids])
            with torch.no_grad(), computing(model):
                loss = model(input_ids=ids, labels=ids).loss.item()
            assert nats / tokens == pytest.approx(loss, abs=0.03) and tokens == ids.shape[1] - 1
    assert len({round(loss, 2) for loss in losses.values()}) == 4


def test_choices_by_shared_prefix_equal_whole_sequences(run: tuple[Recipe, Path, dict[str, Any]], bench: Bench) -> None:
    rows = read_source(run[2]["stages"]["sft"]["questions"], *_question()).rows
    rows.append({"prompt": "The sum is", "answer": "12", "choices": ["1", "12", "elephants and horses"]})
    found = measures.Choices("sft", rows).take(bench)
    for row, picked in zip(rows, found["picked"], strict=True):
        totals = []
        for choice in row["choices"]:
            text = isinstance(row["prompt"], str)
            told = f" {choice}" if text else [{"role": "assistant", "content": choice}]
            reply = render.reply(bench.tokenizer, {"prompt": row["prompt"], "choice": told}, "choice")
            ids = torch.tensor([reply.prompt_ids + reply.reply_ids[:-1]])
            with bench.acting_as("sft"), torch.no_grad(), computing(bench.model):
                logp = torch.log_softmax(bench.model(input_ids=ids).logits[0].float(), -1)
            places = range(len(reply.prompt_ids), ids.shape[1])
            totals.append(sum(logp[place - 1, ids[0, place]].item() for place in places))
        best = max(totals)
        # bfloat16 rounds differently in batches: whatever is picked must be as good as the best.
        assert totals[row["choices"].index(picked)] == pytest.approx(best, abs=0.15)


def test_several_answers_to_a_prompt_read_it_once_and_are_drawn_apart(bench: Bench) -> None:
    """Greedy copies equal one another and a single answer; the log-probabilities are those of a whole forward."""
    prompts = [
        render.prompt(bench.tokenizer, {"prompt": [{"role": "user", "content": text}]})
        for text in ("Hi", "A longer question?")
    ]
    stops = stop_ids(bench.tokenizer)

    def answered(copies: int, temperature: float) -> list:
        with bench.acting_as("sft"):
            return sample(
                bench.actors, prompts, new_tokens=6, temperature=temperature, stops=stops,
                generator=torch.Generator().manual_seed(3), copies=copies,
            )  # fmt: skip

    single, several = answered(1, 0), answered(3, 0)
    assert [e.prompt_ids for e in several] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert [e.answer_ids for e in several] == [single[0].answer_ids] * 3 + [single[1].answer_ids] * 3
    # What both prompts begin with, read once for both, leaves every answer as likely as a whole forward says.
    with bench.acting_as("sft"):
        together = sample(
            bench.actors, prompts, new_tokens=6, temperature=0, stops=stops, generator=torch.Generator(),
            shared=len(os.path.commonprefix(prompts)),
        )  # fmt: skip
    assert len(os.path.commonprefix(prompts)) >= 3 and [e.prompt_ids for e in together] == prompts
    for episode, total in zip(together, bench.log_probs("sft", together, 4), strict=True):
        assert sum(episode.logp) == pytest.approx(total, abs=0.15)
    drawn = answered(8, 1.0)
    assert len({tuple(e.answer_ids) for e in drawn[:8]}) > 1
    whole = bench.log_probs("sft", drawn, 4)
    for episode, total in zip(drawn, whole, strict=True):
        assert sum(episode.logp) == pytest.approx(total, abs=0.15)


def test_what_is_fresh_is_not_taken_again(
    run: tuple[Recipe, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs, _ = run
    monkeypatch.setattr("pipeline.evaluate.measures.BEST_OF", 16)
    evaluation.evaluate(recipe, runs)
    found = evaluation.results_of(recipe, runs)
    assert set(found.verdicts) == {"pretrain", "sft", "reward", "dpo"}
    assert {"question_accuracy", "corpus_loss", "reward"} <= found.numbers["dpo"].keys()
    assert found.numbers["dpo"]["kl"].value != 0 and "kl" not in found.numbers["sft"]
    assert found.best_of_n.policy == "sft" and len(found.best_of_n.points) == 5
    assert {"base", "sft", "dpo", "best of 16"} & set(found.arenas["reward"].names)
    assert {name: verdict for (name, _), verdict in verdicts.read(runs / "tiny").items()} == found.verdicts

    taken: list[str] = []
    monkeypatch.setattr(evaluation, "take", lambda recipe, runs, missing: taken.extend(m.file for m in missing))
    # People's votes on stages are counted, and nothing is measured for them.
    adapters = {link.name: link.adapter for link in found.chain}
    (runs / "arena").mkdir()
    rows = []
    for number in range(24):
        row = line(number, "sft", "dpo", 1)
        for answer in row["candidates"]:
            answer["adapter"] = adapters[answer["stage"]] if number else "e" * 64
        rows.append(json.dumps(row) + "\n")
    (runs / "arena" / "ada.jsonl").write_text("".join(rows))
    evaluation.evaluate(recipe, runs, votes=runs / "arena")
    assert taken == []
    voted = evaluation.results_of(recipe, runs)
    assert voted.people and voted.people.votes == {"sft": 23, "dpo": 23} and voted.people.earlier == 1
    assert "wins 100 % (85 to 100) by people" in verdicts.read(runs / "tiny")["dpo", adapters["dpo"]].text
    # Other questions: what is asked of them is asked anew, of every policy; nothing else is.
    before = {measure.file: measure.fingerprint for measure in plan(recipe, runs)}
    monkeypatch.setattr("pipeline.evaluate.plan.load_rows", _without_last_question)
    changed = {measure.file for measure in plan(recipe, runs) if before[measure.file] != measure.fingerprint}
    assert {name.split("-")[0] for name in changed} == {"questions", "few_shot", "choices", "answers", "best_of_n"}


def test_labels_are_a_classification(run: tuple[Recipe, Path, dict[str, Any]], bench: Bench, tmp_path: Path) -> None:
    """Rows with a label in place of an answer: every label of the file is a choice."""
    tree = {**run[2], "stages": {"sft": {**run[2]["stages"]["sft"], "from": None}}}
    texts, labels = ("You have won!", "See you at nine.", "Call now."), ("spam", "ham", "spam")
    rows = [{"prompt": f"{text} Spam or ham?", "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["stages"]["sft"]["questions"] = str(tmp_path / "labels.jsonl")
    asked = load_rows(build(tree), "sft")[0].questions
    assert [(row["answer"], row["choices"]) for row in asked] == [(label, ["ham", "spam"]) for label in labels]
    value = measures.Labels("sft", list(asked)).take(bench)
    numbers = measures.Labels.numbers(value)
    assert value["wanted"] == list(labels) and numbers["label_commonest"].value == pytest.approx(2 / 3)
    agree = sum(a == b for a, b in zip(value["picked"], labels, strict=True)) / 3
    assert numbers["label_accuracy"].value == pytest.approx(agree)


def _without_last_question(recipe: Recipe, name: str) -> Any:
    rows, sources = load_rows(recipe, name)
    return replace(rows, questions=rows.questions[:-1]), sources


def test_each_stage_is_measured_by_its_own_held_out_rows(tiny_base: Path, tmp_path: Path) -> None:
    """Where two stages learn dialogues, the second one's are a measure of their own, of it and of what comes from it;
    and of the questions of a run each stage has its own."""
    tree = tiny_tree(tiny_base, tmp_path)
    later = {"path": head("demonstrations_test.jsonl", 8, tmp_path / "later.jsonl"), "test": 0.25}
    more = tmp_path / "more.jsonl"
    more.write_text("".join((ROOT / "data/questions.jsonl").read_text().splitlines(True)[2:6]))
    tree["stages"]["sft"]["data"]["test"] = 0.25
    tree["stages"]["again"] = {"kind": "sft", "from": "dpo", "data": later, "questions": str(more)}
    tree["stages"]["last"] = {**tree["stages"]["dpo"], "kind": "dpo", "from": "again"}
    recipe, done = build(tree), ["pretrain", "sft", "reward", "dpo", "again", "last"]
    had = learnt(recipe, tmp_path, done)
    assert {name: of["held_out"] for name, of in had.items()} == {
        "pretrain": "corpus_loss", "sft": "dialogue_loss", "reward": "", "dpo": "", "last": "",
        "again": "loss_of_again",
    }  # fmt: skip
    assert {name: of["asked"] for name, of in had.items() if of["asked"]} == {
        "sft": [0, 1, 2, 3],
        "again": [2, 3, 4, 5],
    }
    found = list(measures.FurtherLoss.wanted(_finished(recipe, tmp_path, done)))
    assert [measure.file for measure in found] == ["loss_of_again-again.json", "loss_of_again-last.json"]
    assert found[0].rows == list(load_rows(recipe, "again")[0].test or [])


def test_a_run_that_is_not_what_the_recipe_says_is_not_measured(
    run: tuple[Recipe, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, runs, tree = run
    with pytest.raises(UserError, match=r"dpo is stale \(train.beta was 0.1, is 0.3\). Run it first"):
        plan(build(tree, ["stages.dpo.train.beta=0.3"]), runs)
    with pytest.raises(UserError, match="no stage of tiny has finished"):
        plan(build(tree), tmp_path)


def test_ppo_warns_of_a_reward_model_no_better_than_length(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the reward stage's own manifest; one that is better is passed over in silence."""
    recipe, models = build(tiny_tree(tiny_base, tmp_path)), {}
    for name, margins in (("honest", [1.0] * 30), ("long", [1.0, -1.0] * 15)):
        lengths = [20, 10] * 15, [10, 20] * 15
        rule = over_longer(margins, *lengths)
        after = {"accuracy": sum(m > 0 for m in margins) / 30, "over_longer": rule.value}
        after |= {"over_longer_low": rule.low, "over_longer_high": rule.high}
        seal(recipe, "pretrain", tmp_path / name, after)
        models[name] = recipe.artifact("pretrain", tmp_path / name)
    loop.warn_of_length(models)
    told = capsys.readouterr().out
    assert "warning: the reward model 'long' ranks 50 %" in told and "honest" not in told


PAID = """
def shorter(completions, **columns):
    return [8.4 - len(told[0]["content"]) / 100 for told in completions]

def right(completions, **columns):
    return [float(len(told[0]["content"]) % 2) for told in completions]

def half(completions, **columns):
    return [0.5] * len(completions)
"""


@pytest.fixture(scope="module")
def paid(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """A tree of sft and ppo, both finished; ppo is paid by a function of the file that is named last."""
    folder = tmp_path_factory.mktemp("paid")
    (folder / "paid.py").write_text(PAID)
    tree = tiny_tree(tiny_base, folder)
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(folder / "prompts.jsonl"), "test": str(folder / "prompts.jsonl")}
    sft = {**tree["stages"]["sft"], "from": None}
    train = {"steps": 1, "batch_size": 4, "response_length": 4}
    ppo = {"from": "sft", "reward": f"{folder}/paid.py:shorter", "data": data, "train": train}
    return {**tree, "stages": {"sft": sft, "ppo": ppo}}, folder / "runs", f"{folder}/paid.py"


def _paid_by(tree: dict[str, Any], *terms: dict[str, Any]) -> Recipe:
    ppo = {**tree["stages"]["ppo"], "reward": list(terms)}
    return build({**tree, "stages": {**tree["stages"], "ppo": ppo}})


def _truths(recipe: Recipe, runs: Path) -> set[Any]:
    return {measure.more["truth"] for measure in plan(recipe, runs) if measure.name == "answers"}


def test_a_reward_function_is_the_truth_only_where_the_recipe_says_so(
    paid: tuple[dict[str, Any], Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, runs, file = paid
    length, right = {"source": f"{file}:shorter"}, {"source": f"{file}:right", "weight": 0}
    recipes = [_paid_by(tree, length, right), _paid_by(tree, length, {**right, "truth": True})]
    assert recipes[0].parts() == recipes[1].parts()  # what is only measured trains nothing anew
    finished(recipes[0], runs)
    assert [_truths(recipe, runs) for recipe in recipes] == [{None}, {f"{file}:right"}]
    assert {m.more["sources"][0] for m in plan(recipes[1], runs) if m.name == "answers"} == {f"{file}:shorter"}
    # Answers that stand in the rows are the truth whatever else pays.
    prompts = runs.parent / "prompts.jsonl"
    rows = [{**json.loads(line), "answer": "1"} for line in prompts.read_text().splitlines()]
    monkeypatch.setattr("pipeline.evaluate.plan._choose_prompts", lambda *_: rows)
    assert _truths(recipes[0], runs) == {"answer"}
    rows[0]["answer"] = None
    assert _truths(recipes[0], runs) == {None}


def test_what_is_declared_the_truth_must_be_one_function_and_say_0_or_1(
    paid: tuple[dict[str, Any], Path, str], bench: Bench
) -> None:
    tree, _, file = paid
    half, right = ({"source": f"{file}:{name}", "truth": True} for name in ("half", "right"))
    with pytest.raises(UserError, match=r"stages.ppo.reward: .*half.* is a second truth; .*right already"):
        _paid_by(tree, right, half)
    pairs = {**tiny_reward(tree), "ppo": {**tree["stages"]["ppo"], "reward": [{"source": "reward", "truth": True}]}}
    with pytest.raises(UserError, match=r"stages.ppo.reward: 'reward' is a reward model.*a function that gives 0 or 1"):
        build({**tree, "stages": {**tree["stages"], **pairs}})
    rows = [{"prompt": [{"role": "user", "content": f"What is {i}?"}], "_place": f"p.jsonl:{i}"} for i in range(2)]
    settings = {"copies": 2, "new_tokens": 4, "seed": 1}
    for sources in ([], [f"{file}:half"]):
        with pytest.raises(UserError, match=r"half is declared the truth and returned 0.5 for the prompt at p.jsonl:0"):
            measures.Answers("sft", rows, {**settings, "sources": sources, "truth": f"{file}:half"}).take(bench)
    more = {**settings, "sources": [f"{file}:shorter"], "truth": f"{file}:right"}
    found = measures.Answers("sft", rows, more).take(bench)
    assert found["truth"] == [[float(len(text) % 2) for text in texts] for texts in found["text"]]
    # PPO calls it in the same way, and pays nobody by it before it is checked.
    terms = _paid_by(tree, {"source": f"{file}:shorter"}, {**half, "weight": 0}).stages["ppo"].reward_terms()
    sources = [rewards.source(term.source, term.weight, term.truth) for term in terms]
    with pytest.raises(UserError, match=r"half is declared the truth and returned 0.5"):
        told = [Told(row, Episode([], [], [], True), text) for row, text in zip(rows, "ab", strict=True)]
        rewards.scores(sources, bench.actors, bench.tokenizer, told, 4)


def test_judges_that_a_stage_was_trained_on_are_known(run: tuple[Recipe, Path, dict[str, Any]], tmp_path: Path) -> None:
    """By what paid it, and by the very pairs: in another file, in another order, or a part of them."""
    tree = json.loads(json.dumps(run[2]))
    pairs = Path(tree["stages"]["dpo"]["data"]["path"]).read_text().splitlines()
    (tmp_path / "part.jsonl").write_text("\n".join(pairs[9::-1]) + "\n")
    (tmp_path / "apart.jsonl").write_text("\n".join(pairs[10:]) + "\n")

    def trained(name: str, of: str, **more: Any) -> dict[str, Any]:
        return {"kind": name, "from": "sft", "data": {"path": str(tmp_path / of)}, "train": {}, **more}

    (tmp_path / "f.py").write_text("def right(completions, **columns): return [1.0] * len(completions)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    free = f"{tmp_path}/f.py:right"
    terms = [{"source": "reward"}, {"source": free, "weight": 0}]
    tree["stages"] |= {
        "apart": trained("reward", "apart.jsonl"),
        "dpo-part": trained("dpo", "part.jsonl"),
        "kto-part": trained("kto", "part.jsonl", train={"train_sampling_strategy": "sequential"}),
        "ppo": trained("ppo", "prompts.jsonl", reward=terms, train={"steps": 1, "batch_size": 1}),
        "ppo-apart": trained("ppo", "prompts.jsonl", reward="apart", train={"steps": 1, "batch_size": 1}),
    }
    recipe = build(tree)
    assert own_judges(recipe, recipe.order()) == {
        "pretrain": {}, "sft": {}, "reward": {}, "apart": {},
        "dpo": {"reward": "which saw 24 of its 24 pairs", "apart": "which saw 14 of its 24 pairs"},
        "dpo-part": {"reward": "which saw 10 of its 10 pairs"},
        "kto-part": {"reward": "which saw 20 of its 20 answers"},
        "ppo": {"reward": "which it was paid by", "apart": "which saw 14 of reward's 24 pairs"},
        "ppo-apart": {"apart": "which it was paid by", "reward": "which saw 14 of apart's 14 pairs"},
    }  # fmt: skip


def tiny_reward(tree: dict[str, Any]) -> dict[str, Any]:
    pairs = "data/comparisons_test.jsonl"
    return {"reward": {"from": "sft", "data": {"path": pairs}, "train": {}}}


def _question() -> tuple[Any, Any]:
    from pipeline.data.contracts import QUESTION
    from pipeline.data.load import DataSpec

    return QUESTION, DataSpec(path="questions")
