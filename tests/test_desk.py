"""Who sees which pair: no prompt twice to one person, a share to two, known answers between, none after its adapter."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import torch
from test_label import PLAIN, draw, make_recipe, train

from pipeline.data import render
from pipeline.data.tokens import without_marks
from pipeline.data.votes import Choose, read_votes
from pipeline.errors import UserError
from pipeline.label.desk import Desk, NotNow
from pipeline.label.drawing import Drawer, Pair, Policy
from pipeline.label.opening import Wishes, open_desk
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.dialogue import decode
from pipeline.models.spec import ModelSpec
from pipeline.recipe.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

PROMPTS = [{"prompt": [{"role": "user", "content": f"Isle {n}?"}]} for n in range(10)]
DISAGREE = Wishes([], [1.0], 2, 9, "disagree", 0, "", "")


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Recipe:
    return make_recipe(tiny_base, tmp_path)


def given(pair: Pair, number: int, **more: Any) -> dict[str, Any]:
    return {"id": f"{pair.name}{number}", "pair": pair.name, "choice": 0, "seconds": 1.0, **more}


def label_all(desk: Desk, *people: str) -> dict[str, list[Pair]]:
    """In turn, until nobody is shown anything."""
    seen: dict[str, list[Pair]] = {person: [] for person in people}
    while True:
        shown = {person: desk.next(person) for person in people}
        for person, pair in shown.items():
            if pair is not None:
                desk.vote(person, given(pair, len(seen[person]), id=uuid4().hex))
                seen[person].append(pair)
        if not any(shown.values()):
            return seen


def test_a_stated_share_is_seen_by_two_and_no_prompt_twice_by_one(recipe: Recipe, tmp_path: Path) -> None:
    wishes = Wishes([], [1.0], 2, 256, "random", 0.5, "", "")
    draw(recipe, tmp_path, wishes)
    desk = open_desk(recipe, wishes, tmp_path / "runs")
    seen = label_all(desk, "ada", "bob", "eve")
    names = [pair.name for pairs in seen.values() for pair in pairs]
    for pairs in seen.values():
        assert len({pair.asks for pair in pairs}) == len(pairs)
    votes = read_votes(tmp_path / "labels")[0]
    shared = {vote.pair for vote in votes if vote.share}
    assert {names.count(name) for name in shared} == {2} and {names.count(n) for n in set(names) - shared} == {1}
    # of 40 pairs that are shared with probability 0.5, within four deviations
    assert len(set(names)) == 40 and abs(len(shared) - 20) < 4 * math.sqrt(10)


def test_known_answers_are_one_in_ten_and_say_which_is_right(recipe: Recipe, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Known {n}?", "chosen": "Right.", "rejected": "Wrong."} for n in range(3)]
    (tmp_path / "gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    wishes = Wishes([], [1.0], 2, 256, "random", 0.0, "", str(tmp_path / "gold.jsonl"))
    draw(recipe, tmp_path, wishes)
    desk = open_desk(recipe, wishes, tmp_path / "runs")
    seen = label_all(desk, "ada")["ada"]
    assert [place for place, pair in enumerate(seen) if pair.gold is not None] == [9, 19, 29]
    known = [vote for vote in read_votes(tmp_path / "labels")[0] if vote.gold is not None]
    assert [vote.candidates[vote.gold or 0].text for vote in known] == ["Right."] * 3


def test_the_sides_are_by_chance_and_the_same_after_a_restart(recipe: Recipe, tmp_path: Path) -> None:
    draw(recipe, tmp_path)
    desk, again = (open_desk(recipe, PLAIN, tmp_path / "runs") for _ in range(2))
    orders = [desk.order("ada", pair) for pair in desk.drawer.pairs]
    assert orders == [again.order("ada", pair) for pair in again.drawer.pairs]
    assert orders != [desk.order("bob", pair) for pair in desk.drawer.pairs]
    assert abs(sum(order[0] for order in orders) - 20) < 4 * math.sqrt(10)


def test_answers_of_an_adapter_that_has_changed_are_not_shown(recipe: Recipe, tmp_path: Path) -> None:
    draw(recipe, tmp_path)
    old = open_desk(recipe, PLAIN, tmp_path / "runs").next("ada")
    assert old
    train(recipe, tmp_path, b"second")
    desk = open_desk(recipe, PLAIN, tmp_path / "runs")
    assert not desk.drawer.pairs and desk.told == [
        "answers drawn with an earlier adapter of sft are not shown again; new ones are drawn"
    ]
    with pytest.raises(NotNow, match="trained again"):
        desk.vote("ada", given(old, 0))
    assert not list((tmp_path / "labels").glob("[!.]*"))


def test_a_reply_that_got_lost_is_not_a_second_vote(recipe: Recipe, tmp_path: Path) -> None:
    draw(recipe, tmp_path)
    desk = open_desk(recipe, PLAIN, tmp_path / "runs")
    pair = desk.next("ada")
    assert pair
    first = desk.vote("ada", given(pair, 0))
    again = open_desk(recipe, PLAIN, tmp_path / "runs")
    assert again.vote("ada", given(pair, 0)) == first
    with pytest.raises(NotNow, match="already"):
        again.vote("ada", given(pair, 1))
    assert again.undo("ada", "u1") == first and again.undo("ada", "u1") == first and again.undo("ada", "u2") is None
    assert len((tmp_path / "labels" / "ada.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    other = again.next("bob")
    assert other
    with pytest.raises(UserError, match="its id is that of another"):
        again.vote("bob", given(other, 0, id=first.id))


def test_a_cut_last_line_is_put_aside_and_the_next_vote_is_whole(recipe: Recipe, tmp_path: Path) -> None:
    draw(recipe, tmp_path)
    label_all(open_desk(recipe, PLAIN, tmp_path / "runs"), "ada")
    file = tmp_path / "labels" / "ada.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    desk = open_desk(recipe, PLAIN, tmp_path / "runs")
    assert "ada.jsonl: its last line was cut short; it is now in" in desk.told[0]
    (pair,) = label_all(desk, "ada")["ada"]
    assert len(read_votes(file)[0]) == 40 and file.read_bytes().startswith(whole[: whole[:-1].rfind(b"\n")])
    assert file.with_suffix(".cut").read_bytes() == whole[:-30].rpartition(b"\n")[2] + b"\n"


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (Wishes(["dpo"], [1.0], 2, 9, "random", 0, "", ""), r"no finished stage 'dpo' .*\(there is: sft, base\)"),
        (Wishes([], [1.0], 2, 9, "gap", 0, "", ""), "--choose gap asks a reward model"),
        (Wishes([], [1.0], 2, 9, "disagree", 0, "", ""), "--choose disagree asks a reward model"),
        (Wishes([], [1.0], 2, 9, "random", 0, "", "", 4), "--best-of 4 asks a reward model"),
        (Wishes([], [0.0], 2, 9, "random", 0, "", ""), "--temperature 0 gives one answer"),
    ],
)
def test_what_cannot_be_drawn_is_refused(recipe: Recipe, tmp_path: Path, wishes: Wishes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_desk(recipe, wishes, tmp_path / "runs")


def test_what_is_asked_with_tools_is_refused_or_told(tiny_base: Path, tmp_path: Path) -> None:
    calculator = "recipes/environments/calculator.py:Calculator"
    stages = {"sft": {"data": {"path": str(tmp_path / "rows.jsonl")}, "environment": calculator}}
    recipe = make_recipe(tiny_base, tmp_path, stages=stages)
    with pytest.raises(UserError, match=r"'sft' answers with the tools of .*Calculator.*\(there is: base\)"):
        open_desk(recipe, Wishes(["sft"], [1.0], 2, 9, "random", 0, "", ""), tmp_path / "runs")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    rows = [{"prompt": [{"role": "user", "content": "Add."}], "tools": [tool]}, {"prompt": "Plain."}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    desk = open_desk(recipe, replace(PLAIN, prompts=str(tmp_path / "mine.jsonl")), tmp_path / "runs")
    assert [row["prompt"] for row in desk.drawer.prompts] == ["Plain."]
    assert desk.told == ["1 prompts are not shown: they name tools"]
    assert [policy.stage for policy in desk.drawer.policies] == ["base", "base"]


def test_what_a_test_holds_out_is_not_labelled(tiny_base: Path, tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    held_out = [{"prompt": "What is made on isle 3?", "completion": "Tin."}]
    test.write_text("".join(json.dumps(row) + "\n" for row in held_out), encoding="utf-8")
    make_recipe(tiny_base, tmp_path)
    stages = {"sft": {"data": {"path": str(tmp_path / "rows.jsonl"), "test": str(test)}}}
    desk = open_desk(make_recipe(tiny_base, tmp_path, stages=stages), PLAIN, tmp_path / "runs")
    asked = [row["prompt"][0]["content"] for row in desk.drawer.prompts]
    assert len(asked) == 39 and "What is made on isle 3?" not in asked
    assert desk.told == ["1 prompts are not shown: a test holds them out"]


def test_disagreement_is_asked_of_several_heads_and_of_the_last_reward_model(tiny_base: Path, tmp_path: Path) -> None:
    pair = {"prompt": "What?", "chosen": "Tin.", "rejected": "Salt."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    stages = {
        "sft": {"data": {"path": str(tmp_path / "rows.jsonl")}},
        "reward": {"from": "sft", "data": {"path": str(tmp_path / "pairs.jsonl")}},
    }
    recipe = make_recipe(tiny_base, tmp_path, stages=stages)
    for head_means in ([], [0.1, 0.2]):
        train(recipe, tmp_path, b"scores", "reward", head_means=head_means)
        if head_means:
            assert open_desk(recipe, DISAGREE, tmp_path / "runs").drawer.choose == "disagree"
            cold = Wishes([], [0.0, 1.0], 2, 9, "random", 0, "", "", 4)
            with pytest.raises(UserError, match="at --temperature 0 all would be alike"):
                open_desk(recipe, cold, tmp_path / "runs")
            draw(recipe, tmp_path, DISAGREE)
            train(recipe, tmp_path, b"again", "reward", head_means=head_means)
            told = "answers drawn with an earlier adapter of reward are not shown again; new ones are drawn"
            assert open_desk(recipe, DISAGREE, tmp_path / "runs").told == [told]
            assert open_desk(recipe, PLAIN, tmp_path / "runs").told == []
        else:
            with pytest.raises(UserError, match="'reward' has one: write `heads: 4` into stages.reward"):
                open_desk(recipe, DISAGREE, tmp_path / "runs")


@pytest.fixture(scope="module")
def bench(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The real base with two policies and a reward model of three heads."""
    from pipeline.evaluate.bench import Bench

    folder = tmp_path_factory.mktemp("bench")
    spec = ModelSpec(base=str(tiny_base), dtype="bfloat16", lora={"r": 4, "target_modules": "all-linear"})
    tokenizer = bases.load_tokenizer(spec)
    for seed, name in enumerate(("sft", "dpo", "reward")):
        torch.manual_seed(seed)
        head = name == "reward"
        base = bases.load_base(spec, tokenizer, num_labels=3 * head)
        model = adapters.fresh(base, spec.lora, head=head)
        with torch.no_grad():
            for weight in adapters.trainable(model).values():
                weight.copy_(torch.randn_like(weight) * 0.1)
        (folder / name).mkdir()
        adapters.save(model, folder / name)
    policies = {name: folder / name for name in ("sft", "dpo")}
    return Bench(spec, policies, {"reward": folder / "reward"}, 1.0)


def drawer(bench: Bench, file: Path, policies: list[Policy], choose: Choose = "random") -> Drawer:
    found = Drawer(file, policies, PROMPTS, 7, 8, choose, lambda: bench, "reward")
    found._draw()
    return found


def score_alone(bench: Bench, texts: list[str], prompt: Any) -> torch.Tensor:
    """(W, K): each answer by itself through the reward model."""
    from pipeline.ppo.rewards import adapter_name

    found = []
    for text in texts:
        row = {"prompt": prompt, "answer": [{"role": "assistant", "content": text}]}
        ids = render.conversation(bench.tokenizer, row, "answer")
        bench.actors.act_as(adapter_name("reward"))
        hidden_TH = bench.actors.hidden(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]
        found.append(hidden_TH[-1].float() @ bench.actors.reward_heads[adapter_name("reward")].float().T)
    return torch.stack(found)


def test_drawn_answers_are_the_models_and_the_widest_gap_comes_first(bench: Bench, tmp_path: Path) -> None:
    """Answers differ, are the same when drawn again, and are ordered by scores taken one by one."""
    policies = [Policy("sft", "a", 1.0), Policy("dpo", "b", 0.7)]
    first, again = (drawer(bench, tmp_path / file, policies, "gap") for file in ("one", "two"))
    assert first.pairs == again.pairs and first.finished and len(first.pairs) > 5
    gaps = []
    with bench.ready():
        for pair in first.pairs:
            one, other = pair.candidates
            assert (one.stage, other.stage) == ("sft", "dpo") and one.text != other.text
            alone = score_alone(bench, [one.text, other.text], pair.prompt).mean(1).tolist()
            assert pair.scores == pytest.approx(alone, abs=0.02)  # in bfloat16
            gaps.append(abs(alone[0] - alone[1]))
    assert all(later < sooner + 0.04 for sooner, later in pairwise(gaps)) and gaps[0] > gaps[-1] + 0.1
    # what is on disk is shown again, and nothing is drawn for it
    assert Drawer(tmp_path / "one", policies, PROMPTS, 7, 8, "gap", lambda: bench, "reward").pairs == first.pairs


def test_the_best_of_several_draws_is_shown(bench: Bench, tmp_path: Path) -> None:
    """What a candidate says of how it came about gives the same draws again, and each shown answer is the one of its
    three that scores highest, one by one; but where that is shown already, another."""
    from pipeline.data.tokens import stop_ids
    from pipeline.models.sampling import sample

    policies = [Policy("sft", "a", 1.0, best_of=3)] * 2
    found = drawer(bench, tmp_path / "one", policies)
    pairs = {pair.asks: pair for pair in found.pairs}
    lifted = 0
    with bench.ready():
        for block in (PROMPTS[:2], PROMPTS[2:]):
            asked = [Pair(row["prompt"], []) for row in block]
            with bench.sampling_as("sft"):
                drawn = sample(
                    bench.actors, [render.prompt(bench.tokenizer, row) for row in block], new_tokens=8, temperature=1.0,
                    stops=stop_ids(bench.tokenizer), copies=8,
                    generator=torch.Generator().manual_seed(pairs[asked[0].asks].candidates[0].seed),
                )  # fmt: skip
            for place, asks in enumerate(pair.asks for pair in asked):
                shown: list[str] = []
                for number, candidate in enumerate(pairs[asks].candidates if asks in pairs else ()):
                    assert candidate.best_of == 3
                    row = {"prompt": pairs[asks].prompt}
                    three = drawn[8 * place + 3 * number : 8 * place + 3 * number + 3]
                    texts = [without_marks(bench.tokenizer, decode(bench.tokenizer, one, row)).strip() for one in three]
                    texts = [text for text in texts if text and text not in shown]
                    scores = score_alone(bench, texts, pairs[asks].prompt).mean(1)
                    assert scores[texts.index(candidate.text)] > scores.max() - 0.04
                    lifted += candidate.text != texts[0]
                    shown.append(candidate.text)
    assert len(pairs) > 5 and lifted > 5


def test_the_pair_on_whose_margin_heads_differ_most_comes_first(bench: Bench, tmp_path: Path) -> None:
    """Of three answers the two that heads differ about most; a loop over heads in place of ours."""
    found = drawer(bench, tmp_path / "one", [Policy("sft", "a", 1.0)] * 3, "disagree")
    worth = []
    with bench.ready():
        for pair in found.pairs:
            alone = score_alone(bench, [candidate.text for candidate in pair.candidates], pair.prompt).tolist()
            deviations = []
            for one, other in ((0, 1), (0, 2), (1, 2)):
                margins = [alone[one][head] - alone[other][head] for head in range(3)]
                mean = sum(margins) / 3
                deviations.append(math.sqrt(sum((margin - mean) ** 2 for margin in margins) / 3))
            worth.append(max(deviations))
    assert len(worth) > 5 and worth[0] > worth[-1] + 0.1
    assert all(later < sooner + 0.04 for sooner, later in pairwise(worth))


def test_of_all_that_was_drawn_the_two_furthest_apart_are_shown(bench: Bench, tmp_path: Path) -> None:
    """The draws of the first block again, from the seed that a candidate names; a loop over all their pairs."""
    from pipeline.data.tokens import stop_ids
    from pipeline.models.sampling import sample

    found = drawer(bench, tmp_path / "one", [Policy("sft", "a", 1.0)] * 2, "gap")
    pairs, block, others = {pair.asks: pair for pair in found.pairs}, PROMPTS[:8], 0
    asked = [Pair(row["prompt"], []).asks for row in block]
    seed = next(pairs[one] for one in asked if one in pairs).candidates[0].seed
    with bench.ready():
        with bench.sampling_as("sft"):
            drawn = sample(
                bench.actors, [render.prompt(bench.tokenizer, row) for row in block], new_tokens=8, temperature=1.0,
                stops=stop_ids(bench.tokenizer), copies=4, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
        told = zip(drawn, [row for row in block for _ in range(4)], strict=True)
        all_texts = [without_marks(bench.tokenizer, decode(bench.tokenizer, one, row)).strip() for one, row in told]
        for place, asks in enumerate(asked):
            texts = list(dict.fromkeys(filter(None, all_texts[4 * place : 4 * place + 4])))
            assert (asks in pairs) == (len(texts) > 1)
            if asks in pairs:
                shown = [candidate.text for candidate in pairs[asks].candidates]
                scores = dict(zip(texts, score_alone(bench, texts, pairs[asks].prompt).mean(1).tolist(), strict=True))
                widest = max(abs(scores[one] - scores[other]) for one in texts for other in texts)
                assert abs(scores[shown[0]] - scores[shown[1]]) > widest - 0.04
                others += shown != texts[:2]
    assert others > 2
