"""What sft, dpo, ppo and grpo learn again of earlier stages: gradients, what is refused, the same after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import head, tiny_tree, write_recipe
from test_ppo import length, make_batch, trainer
from transformers import TrainerCallback

from pipeline.data.render import IGNORED, Encoded
from pipeline.errors import Interrupted, UserError
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.ppo import keeping
from pipeline.ppo.batch import take_in_turn
from pipeline.ppo.keeping import Kept
from pipeline.ppo.ppo import PPOTrainer
from pipeline.recipe.recipe import build, read
from pipeline.runs.rows import load_rows
from pipeline.runs.stage import run_stage
from pipeline.stages import earlier
from pipeline.stages.stage import Context
from pipeline.training import trainer as shared
from pipeline.training.sequences import TEXTS, Tally, store


def texts(seed: int, count: int) -> list[Encoded]:
    """Ragged sequences, some tokens of which carry loss, the first one of the first sequence too."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [chance.randrange(5, 200) for _ in range(chance.randrange(4, 15))]
        found.append(Encoded(ids, [token if chance.random() < 0.5 else IGNORED for token in ids[:-1]] + ids[-1:]))
    return [Encoded(found[0].ids, found[0].ids), *found[1:]]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_adds_the_gradient_of_the_mean_losses(tiny_base: Path, checkpointing: bool) -> None:
    """Beside the policy's own gradient, that of two plain loops over whole logits, one text at a time, at temperature 1
    whatever the rollout's is; each token counts alike, however many a text has."""
    demonstrations, documents = texts(1, 4), texts(2, 4)

    def gradients(kept: list[Kept]) -> tuple[dict[str, torch.Tensor], dict[str, float], PPOTrainer]:
        ppo = trainer(
            tiny_base, length, batch_size=4, per_device_train_batch_size=2, temperature=0.7,
            gradient_checkpointing=checkpointing, max_grad_norm=1e9,
        )  # fmt: skip
        batch, ppo.kept = make_batch(ppo), kept
        found: dict[str, torch.Tensor] = {}
        ppo.optimizers["policy"].step = lambda: found.update(  # type: ignore[method-assign]
            {name: weight.grad.clone() for name, weight in ppo.actors.trained("policy").items()}  # type: ignore[union-attr]
        )
        numbers, _ = ppo.update_minibatch(batch)  # type: ignore[arg-type]
        return found, numbers, ppo

    own, alone, ppo = gradients([])
    both, numbers, _ = gradients([Kept("sft_loss", 0.7, demonstrations), Kept("pretraining_loss", 3.0, documents)])
    losses = {}
    for name, coef, rows in (("sft_loss", 0.7, demonstrations), ("pretraining_loss", 3.0, documents)):
        tokens = sum(label != IGNORED for row in rows for label in row.labels[1:])
        losses[name] = 0.0
        for row in rows:
            ids, labels = torch.tensor(row.ids), torch.tensor(row.labels)[1:]
            logp_TV = torch.log_softmax(ppo.actors.model(input_ids=ids[None]).logits[0, :-1], -1)
            loss = -logp_TV.gather(1, ids[1:, None])[labels != IGNORED].sum() / tokens
            (coef * loss).backward()
            losses[name] += loss.item()
    assert numbers["sft_loss"] == pytest.approx(losses["sft_loss"], rel=1e-5)
    assert numbers["pretraining_loss"] == pytest.approx(losses["pretraining_loss"], rel=1e-5)
    added = 0.7 * losses["sft_loss"] + 3.0 * losses["pretraining_loss"]
    assert numbers["loss"] == pytest.approx(alone["loss"] + added, rel=1e-5)
    for name, weight in ppo.actors.trained("policy").items():
        assert torch.allclose(both[name], own[name] + weight.grad, atol=1e-5, rtol=1e-4), name  # type: ignore[operator]
    assert any(weight.grad.abs().max() > 1e-3 for weight in ppo.actors.trained("policy").values())  # type: ignore[union-attr]


def chain(base: Path, folder: Path, **train: Any) -> dict[str, Any]:
    """pretrain, sft, dpo, ppo: each goes on from the one before it."""
    tree = tiny_tree(base, folder)
    tree["stages"] = {name: tree["stages"][name] for name in ("pretrain", "sft", "dpo")}
    tree["stages"]["ppo"] = {
        "from": "dpo", "reward": "recipes/rewards/fact.py:right",
        "data": {"path": head("prompts.jsonl", 8, folder / "p.jsonl")},
        "train": {"steps": 1, "batch_size": 4, "per_device_train_batch_size": 2, "response_length": 4, **train},
    }  # fmt: skip
    return tree


def test_it_learns_the_training_rows_of_the_nearest_stages(tiny_base: Path, tmp_path: Path) -> None:
    """All of them as that stage had them, and none that it held out; documents in pieces of its max_length."""
    tree = chain(tiny_base, tmp_path, sft_coef=1.0, pretraining_coef=2.0)
    tree["stages"]["sft"]["data"]["test"] = 0.25
    tree["stages"]["pretrain"].setdefault("train", {})["max_length"] = 24
    recipe = build(tree)
    rows = load_rows(recipe, "ppo")[0]
    assert set(rows.earlier) == {"sft", "pretrain"}
    own = load_rows(recipe, "sft")[0]
    assert list(rows.earlier["sft"].rows) == list(own.train) and own.test
    assert not {json.dumps(row) for row in own.test} & {json.dumps(row) for row in rows.earlier["sft"].rows}
    tokenizer = bases.load_tokenizer(recipe.spec.model)
    context = Context(recipe.spec.model, rows, {}, recipe.artifact("ppo", tmp_path), 0, "", lambda: None)
    stored, counts = earlier.store(context, tokenizer, "pretrain")
    whole = [earlier_ids(tokenizer, row["text"]) for row in rows.earlier["pretrain"].rows]
    pieces = [ids[start : start + 24] for ids in whole for start in range(0, len(ids), 24)]
    assert [text.ids for text in stored] == [ids for ids in pieces if len(ids) > 1]
    assert all(text.labels == text.ids for text in stored)
    assert counts["pretrain_rows_again"] == len(stored)


def earlier_ids(tokenizer: Any, text: str) -> list[int]:
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def test_without_such_a_stage_it_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    tree = chain(tiny_base, tmp_path, pretraining_coef=2.0)
    del tree["stages"]["sft"]["from"]
    with pytest.raises(UserError, match=r"r\.yaml:\d+: stages\.ppo\.train\.pretraining_coef: learns rows"):
        read(write_recipe(tree, tmp_path / "r.yaml"))


def test_their_bytes_make_it_stale(tiny_base: Path, tmp_path: Path) -> None:
    tree = chain(tiny_base, tmp_path, sft_coef=1.0)
    file = tmp_path / "more.jsonl"
    tree["stages"]["sft"]["data"]["path"] = head("demonstrations.jsonl", 8, file)
    before = build(tree).parts()["ppo"]
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    assert build(tree).parts()["ppo"] != before


def test_sft_mixes_in_rows_of_earlier_stages(tiny_base: Path, tmp_path: Path) -> None:
    """A quarter of all rows are pieces of the documents that pretrain was trained on; the manifest counts them."""
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"] = {name: tree["stages"][name] for name in ("pretrain", "sft")}
    tree["stages"]["pretrain"]["train"]["max_length"] = 64
    tree["stages"]["sft"] |= {"replay": {"pretrain": 0.25}, "train": {"max_steps": 1}}
    recipe = build(tree)
    for stage in ("pretrain", "sft"):
        run_stage(recipe, stage, tmp_path)
    counts = recipe.artifact("sft", tmp_path).finished().data.counts
    assert counts["rows"] == 32 and counts["pretrain_rows_again"] == round(32 / 3)

    tokenizer, rows = bases.load_tokenizer(recipe.spec.model), load_rows(recipe, "sft")[0]
    context = Context(recipe.spec.model, rows, {}, recipe.artifact("sft", tmp_path), 7, "", lambda: None)
    kind = recipe.kind("sft")
    own = store(rows.train, lambda row: kind.encode(tokenizer, row)[0], TEXTS, Tally("sft", skip=False))
    mixed, again = (earlier.mix_in(context, tokenizer, own, {"pretrain": 0.25}, 128)[0] for _ in range(2))
    assert mixed["input_ids"] == again["input_ids"]
    assert mixed["input_ids"][:32] == own.dataset["input_ids"] and len(mixed) == 32 + round(32 / 3)
    trained, held_out = load_rows(recipe, "pretrain")[0].train, load_rows(recipe, "pretrain")[0].test
    pieces, others = (
        {tuple(ids[start : start + 64]) for ids in whole for start in range(0, len(ids), 64)}
        for whole in ([earlier_ids(tokenizer, row["text"]) for row in some or []] for some in (trained, held_out))
    )
    drawn = {tuple(ids) for ids in mixed["input_ids"][32:]}
    assert drawn <= pieces and not drawn & others
    assert mixed["labels"][32:] == mixed["input_ids"][32:]


def test_dpo_adds_the_gradient_of_replayed_rows_and_ends_the_same_after_a_kill(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step, beside DPO's own gradient, that of a plain loop over the demonstrations that are in turn."""
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"] |= {"dtype": "float32", "quantize": "none"}
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "dpo")}
    tree["stages"]["sft"].pop("from")
    train = {"max_steps": 3, "save_steps": 1, "max_grad_norm": 1e9}
    tree["stages"]["dpo"]["train"] |= train
    replay = {"kind": "dpo", **tree["stages"]["dpo"], "replay": {"sft": 0.7}}
    tree["stages"] |= {"whole": replay, "killed": replay}
    recipe = read(write_recipe(tree, tmp_path / "r.yaml"))
    run_stage(recipe, "sft", tmp_path)
    seen: list[dict[str, torch.Tensor]] = []
    rows: list[Encoded] = []
    model: list[Any] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            weights = adapters.trainable(more["model"])
            seen.append({name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None})
            if state.global_step == 1 and stage == "killed":
                os.kill(os.getpid(), signal.SIGTERM)

    build_trainer = shared.build

    def watched(*given: Any, **options: Any) -> Any:
        made = build_trainer(*given, **options)
        made.add_callback(Watch())
        model[:] = [made.model]
        return made

    def noted(items: Any, first: int, count: int, seed: str) -> Any:
        found = take_in_turn(items, first, count, seed)
        rows.extend(found if not rows else [])
        return found

    monkeypatch.setattr(shared, "build", watched)
    monkeypatch.setattr(keeping, "take_in_turn", noted)
    for stage in ("dpo", "whole"):
        run_stage(recipe, stage, tmp_path)
    assert len(rows) == 4
    with pytest.raises(Interrupted):
        stage = "killed"
        run_stage(recipe, "killed", tmp_path)
    stage = "resumed"
    run_stage(recipe, "killed", tmp_path)
    whole, killed = (recipe.artifact(name, tmp_path).finished() for name in ("whole", "killed"))
    assert whole.files == killed.files
    own, both = seen[0], seen[3]
    adapters.restore(model[0], recipe.artifact("sft", tmp_path).adapter)
    model[0].zero_grad()
    tokens = sum(label != IGNORED for row in rows for label in row.labels[1:])
    for row in rows:
        ids, labels = torch.tensor(row.ids), torch.tensor(row.labels)[1:]
        logp_TV = torch.log_softmax(model[0](input_ids=ids[None]).logits[0, :-1], -1)
        (-0.7 * logp_TV.gather(1, ids[1:, None])[labels != IGNORED].sum() / tokens).backward()
    plain = {name: weight.grad for name, weight in adapters.trainable(model[0]).items()}
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(both[name], own[name] + gradient, atol=1e-5, rtol=1e-4), name
    lines = [json.loads(line) for line in recipe.artifact("whole", tmp_path).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "sft_loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("replay", "said"),
    [
        ({"dpo": 0.1}, "replay.dpo: 'dpo' is not a stage that 'sft' comes from"),
        ({"pretrain": 1.0}, "replay: gives shares"),
    ],
)
def test_what_cannot_be_mixed_in_is_refused(tiny_base: Path, tmp_path: Path, replay: Any, said: str) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"]["sft"]["replay"] = replay
    with pytest.raises(UserError, match=rf"r\.yaml:\d+: stages\.sft\.{said}"):
        read(write_recipe(tree, tmp_path / "r.yaml"))
