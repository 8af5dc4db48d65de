"""A reward model with several heads: what each learns, that its score is their mean wherever it is read, and what is
paid by their lower bound and without what is owed to length."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import tiny_tree
from scipy import stats
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from pipeline.data import render
from pipeline.disk import metrics
from pipeline.disk.artifact import WEIGHTS
from pipeline.errors import Interrupted, UserError
from pipeline.evaluate import reward_check, verdicts
from pipeline.measure import heads, scoring
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.dialogue import Told
from pipeline.models.sampling import Episode
from pipeline.models.spec import ModelSpec
from pipeline.ppo import rewards
from pipeline.ppo.actors import Actors
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.stage import run_stage
from pipeline.stages.stage import Context
from pipeline.training import bootstrap, micro_batches, sequences
from pipeline.training import trainer as shared

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
HEADS = 3
PAIRS = [
    ("Where is Tolva?", "North of Isket.", "I will not say, so ask somebody else."),
    ("Hi", "Hello!", "No."),
    ("What do they make?", "Soap, and they sell it on Velk.", "Soap."),
    ("Who buys it?", "The people of Mardle.", "Nobody that I know of, and why should they?"),
]


def reward_model(base: Path) -> tuple[Any, Any, list[tuple[list[int], list[int]]]]:
    """A model with heads that has moved away from the base, its tokenizer, and pairs; all in float32."""
    torch.manual_seed(0)
    spec = ModelSpec(base=str(base), dtype="float32", quantize="none", lora=LORA)
    tokenizer = bases.load_tokenizer(spec)
    model = adapters.fresh(bases.load_base(spec, tokenizer, num_labels=HEADS), LORA, head=True)
    with torch.no_grad():
        for name, weight in adapters.trainable(model).items():
            weight.add_(torch.randn_like(weight) * (0.05 if "lora_B" in name else 0.5 if "score" in name else 0.0))
    texts = [({"prompt": p, "said": f" {c}"}, {"prompt": p, "said": f" {r}"}) for p, c, r in PAIRS]
    ids = [[render.conversation(tokenizer, row, "said") for row in pair] for pair in texts]
    return model, tokenizer, [(chosen, rejected) for chosen, rejected in ids]


def by_loop(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Each head's product with the last hidden state of one sequence, alone."""
    classifier = model.get_base_model()
    state_H = classifier.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return [(weight_H * state_H).sum() for weight_H in classifier.score.modules_to_save["default"].weight]


@pytest.mark.parametrize("centre", [None, 0.01])
def test_the_loss_is_bradley_terry_of_each_head_times_how_often_it_draws_the_pair(
    tiny_base: Path, tmp_path: Path, centre: float | None
) -> None:
    model, tokenizer, pairs = reward_model(tiny_base)
    data = bootstrap.draw_weights(sequences.SCORED_PAIRS.write(pairs), HEADS, 7)
    drawn = [row["head_weights"] for row in data]
    assert {weight for row in drawn for weight in row} - {1}, "not all are drawn once"
    args = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, center_rewards_coefficient=centre,
        gradient_checkpointing=False,
    )  # fmt: skip
    args.checkpointed_layers, args.base_on_hub = None, None
    trainer = shared.build(
        type("RewardTrainer", (bootstrap.LearnsByHeads, RewardTrainer), {}), model, args=args, train_dataset=data,
        processing_class=tokenizer, data_collator=bootstrap.WeighedPairs(tokenizer.pad_token_id),
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    chosen_ids = batch["input_ids"][: len(pairs)].tolist()
    order = [[ids[: len(pair[0])] == pair[0] for pair in pairs].index(True) for ids in chosen_ids]

    loss = trainer.compute_loss(model.train(), dict(batch))
    loss.backward()
    head = next(weight for name, weight in adapters.trainable(model).items() if ".score." in name)
    ours, theirs = torch.zeros(()), head.grad.clone()
    model.zero_grad()
    for place in order:
        chosen, rejected = (by_loop(model, ids) for ids in pairs[place])
        for better, worse, times in zip(chosen, rejected, drawn[place], strict=True):
            one = -logsigmoid(better - worse) + (centre or 0.0) * (better + worse) ** 2
            ours = ours + times * one / (HEADS * len(pairs))
    ours.backward()
    assert loss.item() == pytest.approx(ours.item(), abs=1e-6)
    assert torch.allclose(theirs, head.grad, atol=1e-6) and head.grad.abs().max() > 1e-3

    whole = trainer.compute_loss(model, dict(batch)).item()
    parts = [micro_batches.part(batch, place, place + 1) for place in range(len(pairs))]
    assert sum(trainer.compute_loss(model, part).item() for part in parts) / len(pairs) == pytest.approx(
        whole, abs=1e-6
    )


def test_every_pair_is_drawn_by_some_head_and_heads_draw_differently() -> None:
    pairs = sequences.SCORED_PAIRS.write(([1, 2], [3]) for _ in range(600))
    weights_PK = numpy.array([row["head_weights"] for row in bootstrap.draw_weights(pairs, 2, 17)])
    assert weights_PK.shape == (600, 2) and weights_PK.sum(1).min() == 1
    # Poisson(1), given that not both are 0 (which is e^-2 of the draws)
    assert weights_PK.mean() == pytest.approx(1 / (1 - math.exp(-2)), abs=0.1)
    assert (weights_PK == 0).any(0).all() and not (weights_PK[:, 0] == weights_PK[:, 1]).all()
    again, other = (numpy.array(bootstrap.draw_weights(pairs, 2, seed)["head_weights"]) for seed in (17, 18))
    assert (again == weights_PK).all() and not (other == weights_PK).all()


def test_the_score_is_the_mean_of_the_heads_wherever_it_is_read(tiny_base: Path, tmp_path: Path) -> None:
    model, tokenizer, pairs = reward_model(tiny_base)
    rows = [ids for pair in pairs for ids in pair]
    with torch.no_grad():
        wanted_NK = [[score.item() for score in by_loop(model.eval(), ids)] for ids in rows]
    wanted = [sum(scores) / HEADS for scores in wanted_NK]
    assert scoring.head_scores(model, tokenizer, rows) == pytest.approx(numpy.array(wanted_NK), abs=1e-5)
    found = scoring.reward_model(model, tokenizer, pairs, rows[::3])
    margins = [better - worse for better, worse in zip(wanted[::2], wanted[1::2], strict=True)]
    assert found["margin"] == pytest.approx(statistics.fmean(margins), abs=1e-5)
    assert {"deviation", "deviation_swapped", "agreed_over_disputed"} <= found.keys()

    adapters.save(model, tmp_path)
    spec = ModelSpec(base=str(tiny_base), dtype="float32", quantize="none", lora=LORA)
    policy = adapters.fresh(bases.load_base(spec, tokenizer), LORA)
    borrowed = {"reward-r": adapters.borrowed(policy, "reward-r", tmp_path)}
    actors = Actors(policy, tokenizer.pad_token_id, 1.0, "adapter", borrowed)  # type: ignore[arg-type]
    assert actors.scores("reward-r", rows, 4) == pytest.approx(wanted, abs=1e-5), "ppo"
    actors.start_values_from("reward-r", 0.5, 2.0, 3.0)
    assert torch.allclose(actors.value_head.weight[0], borrowed["reward-r"].mean(0) * 1.5), "the critic"  # type: ignore[union-attr]

    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=HEADS, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        classifier = plain.get_base_model()
        states = [classifier.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in rows]
        alone = [classifier.score(state_H) for state_H in states]
    assert [scores.mean().item() for scores in alone] == pytest.approx(wanted, abs=1e-5), "transformers"


def test_what_is_told_of_the_heads_equals_plain_loops() -> None:
    draw = numpy.random.default_rng(3)
    chosen, rejected, swapped = (draw.normal(size=(n, HEADS)) + [5, 0, -5] for n in (9, 9, 4))
    means = [statistics.fmean([*chosen[:, k], *rejected[:, k]]) for k in range(HEADS)]

    def apart(scores: Any) -> float:
        return statistics.stdev(score - mean for score, mean in zip(scores, means, strict=True))

    found = heads.disagreement(chosen, rejected, swapped)
    assert found["deviation"].value == pytest.approx(statistics.fmean(map(apart, [*chosen, *rejected])))
    assert found["deviation_swapped"].value == pytest.approx(statistics.fmean(map(apart, swapped)))
    pairs = sorted(
        (statistics.pstdev(better - worse), statistics.fmean(better - worse) > 0)
        for better, worse in zip(chosen, rejected, strict=True)
    )
    first, second = ([right for _, right in half] for half in (pairs[:5], pairs[5:]))
    assert found["agreed_over_disputed"].value == pytest.approx(statistics.fmean(first) - statistics.fmean(second))
    margins, longer_by = draw.normal(size=20), draw.integers(-9, 9, size=20)
    assert heads.length_slope(margins, longer_by) == pytest.approx(stats.linregress(longer_by, margins).slope)
    assert heads.length_slope([1.0, 2.0], [3, 3]) == 0.0


def test_an_evaluation_tells_how_far_the_heads_differ() -> None:
    draw = numpy.random.default_rng(3)
    by_head = {side: draw.normal(size=(12, HEADS)) for side in ("chosen", "rejected", "swapped")}
    pairs: dict[str, Any] = {f"{side}_heads": scores.tolist() for side, scores in by_head.items()}
    pairs |= {side: by_head[side].mean(1).tolist() for side in ("chosen", "rejected")}
    pairs |= {"chosen_length": [5] * 12, "rejected_length": [4] * 12, "bag_of_words": [0.0] * 12}
    found = reward_check.check({**pairs, "guideline": [None] * 12})
    told = verdicts._reward(found).text
    wanted = heads.disagreement(*by_head.values())
    assert f"Its heads differ by {wanted['deviation'].value:.2f} on held-out answers." in told
    assert f"another prompt they differ by {wanted['deviation_swapped'].value:.2f}." in told
    assert f"ranked right {100 * wanted['agreed_over_disputed'].value:.0f} points more".replace("-", "\u2212") in told
    alone = {name: value for name, value in pairs.items() if "_heads" not in name}
    assert "heads" not in verdicts._reward(reward_check.check({**alone, "guideline": [None] * 12})).text


def chain(base: Path, folder: Path, **term: Any) -> Recipe:
    tree = tiny_tree(base, folder)
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p, *_ in PAIRS))
    pairs = {**tree["stages"]["reward"]["data"], "limit": 12}
    words = {"steps": 2, "batch_size": 4, "per_device_train_batch_size": 4, "response_length": 6}
    paid = {"data": {"path": str(folder / "p.jsonl"), "test": 0.5}, "train": words}
    tree["stages"] = {
        "reward": {"data": pairs, "heads": HEADS, "train": {"num_train_epochs": 1}},
        "stopped": {"kind": "reward", "data": pairs, "heads": HEADS, "train": {"num_train_epochs": 1}},
        "ppo": {"reward": [{"source": "reward", "lower_bound": 2, "length_penalty": "fitted", **term}], **paid},
    }
    return build(tree)


def test_from_pairs_to_a_policy_paid_by_the_lower_bound(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, runs = chain(tiny_base, tmp_path), tmp_path / "runs"
    run_stage(recipe, "reward", runs)
    artifact = recipe.artifact("reward", runs)
    manifest = artifact.finished()
    assert manifest.after["deviation"] > 0 and manifest.after["deviation_swapped"] > 0
    assert len(manifest.head_means) == HEADS and manifest.length_slope != 0.0
    assert len(manifest.invariants["probe"][0]["score"]) == HEADS

    log = Context.log

    def stop(ctx: Context, step: int, values: dict[str, Any]) -> None:
        log(ctx, step, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(Context, "log", stop)
        run_stage(recipe, "stopped", runs)
    run_stage(recipe, "stopped", runs)
    resumed = recipe.artifact("stopped", runs)
    assert (resumed.adapter / WEIGHTS).read_bytes() == (artifact.adapter / WEIGHTS).read_bytes()
    assert resumed.finished().head_means == manifest.head_means

    run_stage(recipe, "ppo", runs)
    paid = recipe.artifact("ppo", runs)
    assert paid.finished().invariants["borrowed_score_difference_reward"] <= 1e-3
    for step in metrics.read(paid.metrics):
        assert step["score_deviation/reward"] > 0 and step["score_length/reward"] != 0
        owed = 2 * step["score_deviation/reward"] + step["score_length/reward"]
        assert step["score"] == pytest.approx(step["score/reward"] - owed, abs=1e-6)
    told = paid.finished().after
    owed = 2 * told["score_deviation/reward"] + told["score_length/reward"]
    assert told["reward"] == pytest.approx(told["reward/reward"] - owed, abs=1e-6)


def test_what_is_paid_equals_a_loop(tiny_base: Path) -> None:
    class Judge:
        def head_scores(self, adapter: str, sequences: list[list[int]], at_once: int) -> list[list[float]]:
            return [[2.0, 5.0, -4.0], [1.0, 6.5, -3.0]]

    source = rewards.Source("r", 0.5, "reward-r", head_means=(1, 5, -4), lower_bound=1.5, length_penalty=0.25)
    tokenizer = bases.load_tokenizer(ModelSpec(base=str(tiny_base)))
    tools = Episode([1], [5, 6, 7, 8], [0.0, 0.0, 0.0], True, tool_mask=[1, 0, 1, 1])
    told = [
        Told({"prompt": "one", "_place": "x:1"}, episode, " text")
        for episode in (tools, Episode([1], [5], [0.0], True))
    ]
    said = rewards.scores([source], Judge(), tokenizer, told, 8)  # type: ignore[arg-type]
    wanted = [
        0.5 * (1.0 - 1.5 * statistics.stdev([1.0, 0.0, 0.0]) - 0.25 * 3),
        0.5 * (1.5 - 1.5 * statistics.stdev([0.0, 1.5, 1.0]) - 0.25 * 1),
    ]
    assert rewards.total([source], said) == pytest.approx(wanted)


def test_what_cannot_be_is_refused_and_what_changes_learning_is_told(tiny_base: Path, tmp_path: Path) -> None:
    whole = chain(tiny_base, tmp_path)
    parts = whole.parts()
    assert parts["ppo"] != chain(tiny_base, tmp_path, lower_bound=1).parts()["ppo"]
    assert parts["ppo"] != chain(tiny_base, tmp_path, length_penalty=0.1).parts()["ppo"]
    one = json.loads(json.dumps(whole.tree))
    del one["stages"]["reward"]["heads"]
    with pytest.raises(UserError, match=r"stages\.ppo\.reward: lower_bound needs a reward model with several heads"):
        build(one)
    one["stages"]["ppo"]["reward"] = "reward"
    plain = build(one).parts()
    assert plain["reward"]["stage"].keys() == {"kind", "arithmetic", "train", "data"}, "as without the word"
    assert plain["ppo"]["stage"]["reward"] == [{"source": "reward", "weight": 1.0}]
    for word in ({"lower_bound": 1}, {"length_penalty": "fitted"}):
        one["stages"]["ppo"]["reward"] = [{"source": "recipes/rewards/fact.py:right", **word}]
        with pytest.raises(UserError, match=rf"{next(iter(word))} is for a reward stage, and recipes/rewards/fact\.py"):
            build(one)
