"""KTO: loss and gradient are the paper's, the reference is the start, thumbs come in as people have them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import tiny_tree, write_recipe
from torch.nn.functional import log_softmax
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.data import render
from pipeline.data.contracts import RATED
from pipeline.data.load import DataSpec, read_source
from pipeline.disk import metrics
from pipeline.errors import BrokenInvariant, UserError
from pipeline.measure import scoring
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.spec import ModelSpec
from pipeline.recipe.recipe import build, read
from pipeline.runs.stage import run_stage
from pipeline.training import invariants, progress, rated
from pipeline.training import trainer as shared


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


ANSWERS = [
    ([user("How far is it?")], [says("From where?"), user("From the harbour"), says("Two miles.")], True),
    ([user("Name a colour.")], [says("No, I will not do that now.")], False),
    ([user("Who made the old bells of Gusk?")], [says("The people of Gusk.")], True),
    ("Once upon a time there", " was a fox", False),
    ([user("Add 2 and 3")], [says("5")], True),
]
ROWS = [{"prompt": prompt, "completion": said, "label": label} for prompt, said, label in ANSWERS]


def a_trainer(base: Path, folder: Path, **train: Any) -> tuple[list[rated.Rated], Any]:
    """The stage's trainer on rows in the order in which they are written here."""
    from trl import KTOConfig, KTOTrainer

    spec = ModelSpec(base=str(base), dtype="float32", lora={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    tokenizer = bases.load_tokenizer(spec)
    torch.manual_seed(0)
    model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora)
    move(model)
    items = [rated.Rated(render.reply(tokenizer, row, "completion"), row["label"]) for row in ROWS]
    coupled = train.get("loss_type", "kto") == "kto"
    named = (({"_place": str(place)}, item) for place, item in enumerate(items))
    tally = rated.Tally("kto", skip=False)
    tally.counts["rows"] = len(items)
    fitted = rated.couple(named, tally, 256, len(items) if coupled else None)
    args = KTOConfig(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=len(items),
        gradient_checkpointing=False, max_length=256, **train,
    )  # fmt: skip
    args.checkpointed_layers = args.base_on_hub = None
    trainer = shared.build(
        type("KTOTrainer", (shared.TakesEncoded, KTOTrainer), {}), model, args=args,
        train_dataset=rated.form(coupled).write(fitted), processing_class=tokenizer,
        data_collator=rated.LearntAnswers(tokenizer.pad_token_id, 256),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    return items, trainer


def move(model: Any, by: float = 0.05) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".default." in name:
                weight.add_(torch.randn_like(weight) * by)


def spoken(model: Any, prompt: render.Reply, answer: render.Reply) -> torch.Tensor:
    """log pi of the tokens with loss of an answer after a prompt: one row, no padding, the whole softmax."""
    ids = prompt.prompt_ids + answer.reply_ids
    logp_TV = log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    start = len(prompt.prompt_ids)
    places = [start + place for place, label in enumerate(answer.labels) if label != render.IGNORED]
    return sum(logp_TV[place - 1, ids[place]] for place in places)  # type: ignore[return-value]


def by_hand(model: Any, items: list[rated.Rated], loss_type: str, beta: float, up: float, down: float) -> torch.Tensor:
    """Equation 8 of arXiv 2402.01306 with its z0, each prompt with the answer before its own; of apo_zero_unpaired the
    same with z0 = 0 (arXiv 2408.06266, eq. 7 without pairs)."""
    replies = [item.reply for item in items]
    couples = list(zip(replies, [replies[-1], *replies[:-1]], strict=True))
    model.set_adapter("ref")
    with torch.no_grad():
        own_ref = [spoken(model, reply, reply) for reply in replies]
        other_ref = [spoken(model, prompt, answer) for prompt, answer in couples]
    model.set_adapter("default")
    own = [spoken(model, reply, reply) for reply in replies]
    with torch.no_grad():
        gained = [spoken(model, *couple) - ref for couple, ref in zip(couples, other_ref, strict=True)]
    z0 = torch.stack(gained).mean().clamp(min=0) if loss_type == "kto" else torch.tensor(0.0)
    losses = []
    for item, policy, reference in zip(items, own, own_ref, strict=True):
        distance = beta * (policy - reference - z0)
        value = torch.sigmoid(distance if item.good else -distance)
        losses.append((up if item.good else down) * (1 - value))
    return torch.stack(losses).mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in adapters.trainable(model).items()}


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_and_gradient_equal_the_formula(tiny_base: Path, tmp_path: Path, loss_type: str) -> None:
    weighed = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    items, trainer = a_trainer(tiny_base, tmp_path, loss_type=loss_type, **weighed)
    model = trainer.model
    move(model, 0.1)
    model.eval()
    theirs = trainer.compute_loss(model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    theirs.backward()
    kl = trainer._metrics["eval"]["kl"][-1]
    assert kl > 0.01 if loss_type == "kto" else kl == 0  # else the term would not be seen
    found = gradients(model)
    model.zero_grad()
    ours = by_hand(model, items, loss_type, *weighed.values())
    ours.backward()
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-5)
    assert max((found[name] - wanted).abs().max().item() for name, wanted in gradients(model).items()) < 1e-5
    assert max(wanted.abs().max().item() for wanted in gradients(model).values()) > 1e-3


@pytest.mark.parametrize("train", [{}, {"loss_type": "apo_zero_unpaired"}, {"precompute_ref_log_probs": True}])
def test_it_starts_at_its_reference_and_at_no_other(tiny_base: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    _, trainer = a_trainer(tiny_base, tmp_path, undesirable_weight=0.5, **train)
    found = invariants.rated_reference_is_the_start(trainer)
    assert found["step_0_log_ratio"] < 1e-4 and found["step_0_kl"] < 1e-4
    assert found["step_0_loss"] == pytest.approx((3 * 1.0 + 2 * 0.5) / 2 / 5, abs=1e-5)
    move(trainer.model, 0.1)
    with pytest.raises(BrokenInvariant, match="a reference that is not the policy"):
        invariants.rated_reference_is_the_start(trainer)


def test_parts_add_up_without_a_kl_term_and_are_refused_with_one(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, trainer = a_trainer(tiny_base, tmp_path, loss_type="apo_zero_unpaired", desirable_weight=2.0)
    move(trainer.model, 0.1)
    batch, found = next(iter(trainer.get_train_dataloader())), {}
    for at_once in (None, 3, 1):
        trainer.rows_at_once = at_once
        found[at_once] = trainer.training_step(trainer.model, dict(batch)).item(), gradients(trainer.model)
        trainer.model.zero_grad()
    for at_once in (3, 1):
        assert found[at_once][0] == pytest.approx(found[None][0], abs=1e-5)
        assert max((found[None][1][n] - g).abs().max().item() for n, g in found[at_once][1].items()) < 1e-5
    _, trainer = a_trainer(tiny_base, tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "_compute_kl_logps", full)
    with pytest.raises(UserError, match="5 rows at once, .*loss_type kto estimates its KL term from all rows"):
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))


def test_held_out_numbers_equal_plain_loops() -> None:
    chance = random.Random(1)
    start = [chance.uniform(-20, -5) for _ in range(40)]
    now = [value + chance.choice([-1.0, 0.0, 0.5, 2.0]) for value in start]
    good = [chance.random() < 0.4 for _ in start]
    rewards = [0.2 * (after - before) for after, before in zip(now, start, strict=True)]
    up = [reward for reward, label in zip(rewards, good, strict=True) if label]
    down = [reward for reward, label in zip(rewards, good, strict=True) if not label]
    found = scoring.ratings(now, start, good, 0.2)
    above = [1.0 if a > b + 1e-9 else 0.0 if a < b - 1e-9 else 0.5 for a in up for b in down]
    right = [
        0.5 if abs(reward) < 1e-9 else float((reward > 0) == label) for reward, label in zip(rewards, good, strict=True)
    ]
    assert found["reward_margin"] == pytest.approx(numpy.mean(up) - numpy.mean(down))
    assert found["sign_accuracy"] == pytest.approx(numpy.mean(right))
    assert found["reward_auc"] == pytest.approx(numpy.mean(above), abs=0.02)  # now - start may miss a tie by a bit
    at_start = scoring.ratings(start, start, good, 0.2)
    assert at_start == {"sign_accuracy": 0.5, "reward_auc": 0.5, "reward_margin": 0.0}
    assert scoring.ratings(now, start, [True] * len(now), 0.2).keys() == {"sign_accuracy"}


UP, DOWN = {"label": True}, {"label": False}
LAYOUTS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"prompt": "p", "completion": "c", "label": True}, [{"prompt": "p", "completion": "c", **UP}]),
    ({"prompt": [user("q")], "completion": [says("a")], "label": 0, "id": 7},
     [{"prompt": [user("q")], "completion": [says("a")], "id": 7, **DOWN}]),
    ({"messages": [user("q"), says("a")], "label": False},
     [{"prompt": [user("q")], "completion": [says("a")], **DOWN}]),
    ({"instruction": "do", "input": "x", "output": "y", "kto_tag": True},
     [{"prompt": [user("do\n\nx")], "completion": [says("y")], **UP}]),
    ({"instruction": "do", "output": "y", "label": False},
     [{"prompt": [user("do")], "completion": [says("y")], **DOWN}]),
    ({"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "kto_tag": False},
     [{"prompt": [user("h")], "completion": [says("g")], **DOWN}]),
    ({"question": "q", "answer": "a", "label": 1}, [{"prompt": [user("q")], "completion": [says("a")], **UP}]),
    ({"prompt": "p", "chosen": "c", "rejected": "r"},
     [{"prompt": "p", "completion": "c", **UP}, {"prompt": "p", "completion": "r", **DOWN}]),
    ({"chosen": "\n\nHuman: h\n\nAssistant: c", "rejected": "\n\nHuman: h\n\nAssistant: r"},
     [{"prompt": [user("h")], "completion": [says("c")], **UP},
      {"prompt": [user("h")], "completion": [says("r")], **DOWN}]),
    ({"instruction": "do", "output": "o", "chosen": "c", "rejected": "r"},
     [{"prompt": [user("do")], "completion": [says("c")], **UP},
      {"prompt": [user("do")], "completion": [says("r")], **DOWN}]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wanted"), LAYOUTS)
def test_thumbs_as_people_have_them(tmp_path: Path, row: dict[str, Any], wanted: list[dict[str, Any]]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    rows = read_source(str(path), RATED, DataSpec(path="-")).rows
    assert [{key: value for key, value in row.items() if key != "_place"} for row in rows] == wanted


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "p", "completion": "c"}, "rows.jsonl:1: has no field 'label': true is thumbs up"),
        ({"prompt": "p", "completion": "c", "label": "good"}, "field 'label' is 'good', expected true or false"),
        ({"prompt": "p", "completion": "", "label": True}, "field 'completion' is empty"),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "are equal, so the pair teaches nothing"),
        (
            {"messages": [user("q"), says("a"), user("q")], "label": True},
            "field 'messages' does not end with an answer of the assistant",
        ),
        ({"prompt": "p", "replies": ["a", "b"]}, "has no field 'completion'"),
    ],
)
def test_a_row_without_a_thumb_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=re.escape(says)):
        read_source(str(path), RATED, DataSpec(path="-"))


def test_a_table_of_thumbs(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\np,good,True\np,bad,false\np,other,1\n")
    assert [row["label"] for row in read_source(str(path), RATED, DataSpec(path="-")).rows] == [True, False, True]


def chain(base: Path, folder: Path, rows: list[dict[str, Any]] | None = None, **train: Any) -> dict[str, Any]:
    tree = tiny_tree(base, folder)
    sft, pairs = tree["stages"]["sft"], tree["stages"]["dpo"]["data"]
    del sft["from"]
    if rows is not None:
        (folder / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = {"path": str(folder / "thumbs.jsonl")}
    usual = {"train_sampling_strategy": "sequential", "num_train_epochs": 1}
    tree["stages"] = {
        "sft": sft,
        "kto": {"from": "sft", "questions": sft["questions"], "data": pairs, "train": {**usual, **train}},
    }
    return tree


def typed(*words: str, status: int = 0) -> str:
    """What a command prints, its lines joined."""
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert done.exit_code == status, done.output  # of a UserError, which main() makes 2 of, it is 1
    return " ".join(done.output.split())


def test_a_chain_of_sft_and_kto_leaves_its_numbers(tiny_base: Path, tmp_path: Path) -> None:
    tree = chain(tiny_base, tmp_path, save_steps=2)
    recipe, runs = str(write_recipe(tree, tmp_path / "recipe.yaml")), tmp_path / "runs"
    for stage in ("sft", "kto"):
        run_stage(read(Path(recipe)), stage, runs)
    folder = runs / "tiny" / "kto"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["before"]["reward_auc"] == 0.5 and manifest["before"]["reward_margin"] == 0
    assert manifest["after"].keys() >= {"reward_auc", "reward_margin", "sign_accuracy", "question_accuracy"}
    assert manifest["after"]["reward_margin"] != 0
    assert manifest["invariants"]["step_0_loss"] == pytest.approx(0.5, abs=1e-4)
    assert manifest["invariants"]["adapter_equals_parents"] and manifest["data"]["counts"]["rows"] == 48
    lines = metrics.read(folder / "metrics.jsonl")
    assert all(line["computed_per_token"] < 1.001 <= line["padded_per_token"] for line in lines if "loss" in line)
    assert "good answers gain more than bad ones" in typed("status", recipe, "--runs", str(runs))
    assert "kto" in typed("plan", recipe, "--runs", str(runs), "--gpu", "rtx3060")


def test_a_broken_run_that_goes_on_ends_with_the_same_bytes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = chain(tiny_base, tmp_path, save_steps=3, num_train_epochs=0.5)
    del tree["stages"]["sft"], tree["stages"]["kto"]["from"], tree["stages"]["kto"]["questions"]
    tree["model"]["lora"]["lora_dropout"] = 0.1  # the random state must come back too
    tree["stages"]["kto"]["train"]["disable_dropout"] = False
    recipe = build(tree)

    def fall_over(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert state.global_step < 4

    with monkeypatch.context() as planted:
        planted.setattr(progress.Snapshots, "on_step_end", fall_over)
        with pytest.raises(AssertionError):
            run_stage(recipe, "kto", tmp_path / "broken")
    for runs in ("broken", "whole"):
        run_stage(recipe, "kto", tmp_path / runs)
    assert "going on from step 3" in capsys.readouterr().out
    broken, whole = (recipe.artifact("kto", tmp_path / runs).adapter / adapters.WEIGHTS for runs in ("broken", "whole"))
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"loss_type": "bco"}, "loss_type: is 'bco'; the trainer takes kto, apo_zero_unpaired"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: is 1; loss_type kto estimates its KL term"),
        ({"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 8}, "is auto; loss_type kto"),
        ({"train_sampling_strategy": "group_by_length"}, "write sequential for this stage"),
        ({"per_device_train_batch_tokens": 900}, "is not for kto, whose batches have so many rows"),
        ({"sync_ref_model": True}, "TRL cannot do it with an adapter"),
        ({"desirable_weigth": 2}, "unknown key; did you mean 'desirable_weight'"),
        ({"desirable_weight": -1}, "expected a number of at least 0"),
        ({"desirable_weight": 0, "undesirable_weight": 0.0}, "nothing would be learnt"),
    ],
)
def test_what_the_trainer_would_refuse_late_is_named_first(
    tiny_base: Path, tmp_path: Path, train: dict[str, Any], says: str
) -> None:
    tree = chain(tiny_base, tmp_path)
    tree["train"].pop("per_device_train_batch_size")
    tree["stages"]["kto"]["train"] |= train
    with pytest.raises(UserError, match=re.escape(says)):
        build(tree)


def test_imbalance_is_told_with_the_weights_that_make_up_for_it(tiny_base: Path, tmp_path: Path) -> None:
    def told(up: int, down: int, **train: Any) -> list[str]:
        spec = build(chain(tiny_base, tmp_path, **train)).stages["kto"]
        return spec.warn_rows([UP] * up + [DOWN] * down, [UP, DOWN])

    (text,) = told(20, 60)
    assert "20 answers have thumbs up and 60 thumbs down" in text
    assert "desirable_weight from 3.00 to 3.99 or undesirable_weight from 0.25 to 0.33, not both" in text
    assert not told(20, 60, desirable_weight=3.5) and not told(20, 60, undesirable_weight=0.3) and not told(9, 9)
    balanced = build(chain(tiny_base, tmp_path)).stages["kto"]
    assert "all have the same label" in balanced.warn_rows([UP, DOWN], [UP])[0]
    rows = [{"prompt": "p", "completion": "c", "label": place < 4} for place in range(12)]
    recipe = write_recipe(chain(tiny_base, tmp_path, rows), tmp_path / "recipe.yaml")
    assert "4 answers have thumbs up and 8 thumbs down" in typed("data", str(recipe), "kto")
    recipe = write_recipe(chain(tiny_base, tmp_path, rows[:4]), tmp_path / "recipe.yaml")
    assert "every answer has thumbs up, and kto learns from both" in typed("data", str(recipe), "kto", status=1)
