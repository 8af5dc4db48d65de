"""Batches by a budget of tokens: which rows they take, what a row counts in a step, and how a run goes on with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from conftest import launch_stage, tiny_tree, write_recipe
from safetensors.torch import load_file
from test_out_of_memory import a_trainer, trained, tree_of
from torch.utils.data import RandomSampler

from pipeline.data.load import DataSpec
from pipeline.data.render import Encoded
from pipeline.errors import UserError
from pipeline.models import adapters
from pipeline.models.spec import ModelSpec
from pipeline.plan.lengths import Lengths
from pipeline.plan.shapes import Adapter, shapes_of
from pipeline.plan.sizes import TOKENS
from pipeline.plan.stage import Model, _batches, _passes, work_of
from pipeline.recipe.recipe import build
from pipeline.runs.stage import run_stage
from pipeline.stages import STAGES
from pipeline.training import progress, sequences
from pipeline.training.token_batches import TokenBatches, count_tokens


def of_lengths(base: Path, folder: Path, lengths: list[int], **train: Any) -> Any:
    """An SFT trainer of rows of these lengths."""
    trainer = a_trainer(base, folder, "sft", **train)
    trainer.train_dataset = sequences.TEXTS.write(Encoded([5 + n % 7] * n, [5 + n % 7] * n) for n in lengths)
    return trainer


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_rows_come_once_an_epoch_in_their_order_and_within_the_budget(
    tiny_base: Path, tmp_path: Path, strategy: str
) -> None:
    draw, budget, epochs = random.Random(3), 90, 4
    lengths = [*(draw.randint(2, 60) for _ in range(150)), 128]  # the last is longer than the budget
    trainer = of_lengths(tiny_base, tmp_path, lengths, num_train_epochs=epochs, train_sampling_strategy=strategy)

    def drawn() -> list[list[list[int]]]:
        torch.manual_seed(trainer.args.seed)  # as at the start of training
        loader, found = trainer.get_train_dataloader(), []
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            found.append([list(batch) for batch in loader.batch_sampler])
            assert len(found[-1]) == len(loader)
        return found

    by_rows = drawn()
    setattr(trainer.args, TOKENS, budget)
    by_tokens, plain = drawn(), []
    for batches in by_rows:
        plain.append([])
        for row in (row for batch in batches for row in batch):
            if not plain[-1] or sum(lengths[one] for one in [*plain[-1][-1], row]) > budget:
                plain[-1].append([])
            plain[-1][-1].append(row)
    most = max(map(len, plain))
    for expected, found in zip(plain, by_tokens, strict=True):
        assert sorted(sum(found, [])) == list(range(len(lengths)))
        assert sum(found, []) == sum(expected, [])
        assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= budget for batch in found)
        assert len(found) == most and {batch[0] for batch in expected} <= {batch[0] for batch in found}
        if len(expected) == most:
            assert found == expected
    if strategy == "random":
        assert len(set(map(len, plain))) > 1 and by_tokens[0] != by_tokens[1]


def test_each_of_several_processes_has_as_many_batches_and_no_row_is_dealt_twice() -> None:
    lengths = [random.Random(2).randint(1, 30) for _ in range(61)]
    args = {"seed": 4, "max_steps": 50, "gradient_accumulation_steps": 2, "world_size": 3, TOKENS: 64}
    dealt = [
        list(TokenBatches(RandomSampler(lengths), lengths, SimpleNamespace(**args, process_index=rank)))
        for rank in range(3)
    ]
    assert len(set(map(len, dealt))) == 1
    assert sorted(row for batches in dealt for batch in batches for row in batch) == list(range(61))
    with pytest.raises(UserError, match=f"{TOKENS} 64 .* raise it, or start fewer processes"):
        TokenBatches(RandomSampler([64] * 4), [64] * 4, SimpleNamespace(**args, process_index=0))


def test_a_pairs_tokens_are_those_of_both_sides(tiny_base: Path, tmp_path: Path) -> None:
    for stage in ("reward", "dpo"):
        rows = a_trainer(tiny_base, tmp_path, stage).train_dataset
        both = [
            sum(len(row.get("prompt_ids", [])) + len(row[side]) for side in ("chosen_ids", "rejected_ids"))
            for row in rows
        ]
        assert count_tokens(rows) == both


def gradients(trainer: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.training_step(trainer.model, dict(batch), None)
    return {name: weight.grad.clone() for name, weight in adapters.trainable(trainer.model).items()}


@pytest.mark.parametrize(
    ("stage", "train"),
    [("reward", {}), ("dpo", {}), ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 1.0]})],
    ids=["reward", "dpo", "dpo-and-sft"],
)
def test_every_pair_weighs_the_same_in_a_step(
    tiny_base: Path, tmp_path: Path, stage: str, train: dict[str, Any]
) -> None:
    trainer = a_trainer(tiny_base, tmp_path, stage, **train)
    rows = list(trainer.train_dataset)
    whole = trainer.data_collator(rows)
    expected = gradients(trainer, [whole])
    if not train:  # one pair after the other, each as much as any
        for name, gradient in gradients(trainer, [trainer.data_collator([row]) for row in rows]).items():
            assert torch.allclose(gradient, expected[name], atol=2e-5)
    setattr(trainer.args, TOKENS, sum(count_tokens(trainer.train_dataset)) * 3 // 4)
    loader = trainer.get_train_dataloader()
    batches, items = trainer.get_batch_samples(iter(loader), len(loader), trainer.args.device)
    sizes = [len(batch["input_ids"]) // 2 for batch in batches]
    assert items is None and len(set(sizes)) > 1 and sum(sizes) == len(rows)
    for at_once in (None, 1):
        trainer.rows_at_once = at_once
        for name, gradient in gradients(trainer, batches).items():
            assert torch.allclose(gradient, expected[name], atol=2e-5), (name, at_once)


def by_tokens(base: Path, folder: Path) -> dict[str, Any]:
    tree = tiny_tree(base, folder)
    tree["stages"] = {name: tree["stages"][name] for name in ("sft", "dpo")}
    for section in tree["stages"].values():
        section.pop("questions", None)
        section["train"] |= {"num_train_epochs": 3, "gradient_accumulation_steps": 2}
    tree["stages"]["sft"].pop("from")
    tree["stages"]["sft"]["train"][TOKENS] = 200  # takes the place of the rows that the recipe says for all
    tree["stages"]["dpo"]["train"] |= {TOKENS: 600, "train_sampling_strategy": "random"}
    tree["train"]["save_steps"] = 1
    tree["model"]["lora"]["lora_dropout"] = 0.1
    return tree


def test_stopped_anywhere_and_run_again_equals_unbroken(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build(by_tokens(tiny_base, tmp_path))
    mark = progress.mark_checkpoint
    last = {}
    for name in recipe.order():
        run_stage(recipe, name, tmp_path / "unbroken")
        last[name] = json.loads((tmp_path / "unbroken/tiny" / name / "manifest.json").read_text())["data"]["counts"]
        for step in (1, last[name]["steps"] // 3 + 1, last[name]["steps"] - 1):

            def killed(folder: Path, *rest: Any, at: int = step) -> None:
                mark(folder, *rest)
                if progress.step_of(folder) == at:
                    raise KeyboardInterrupt

            with monkeypatch.context() as planted:
                planted.setattr(progress, "mark_checkpoint", killed)
                with pytest.raises(KeyboardInterrupt):
                    run_stage(recipe, name, tmp_path / "broken")
        run_stage(recipe, name, tmp_path / "broken")
        ends = [tmp_path / run / "tiny" / name / "adapter/adapter_model.safetensors" for run in ("unbroken", "broken")]
        assert ends[0].read_bytes() == ends[1].read_bytes()
        lines = [json.loads(line) for line in (ends[0].parent.parent / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, last[name]["steps"] + 1))
        # sft draws dropout for each row, so nothing is shared; TRL turns it off for dpo, whose pairs share a prompt.
        assert all((line["computed_per_token"] < 1) == (name == "dpo") for line in lines)
        assert all(line["computed_per_token"] <= 1 <= line["padded_per_token"] for line in lines)


def test_pretrain_that_does_not_pack_and_classify_take_it_too(tiny_base: Path, tmp_path: Path) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": f"{'sun ' * (n % 7)}{n}", "label": n % 2} for n in range(40)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["stages"] = {
        "pretrain": {**tree["stages"]["pretrain"], "train": {TOKENS: 500, "packing": False, "num_train_epochs": 1}},
        "classify": {"data": {"path": str(labelled)}, "train": {TOKENS: 100, "num_train_epochs": 2}},
    }
    recipe = build(tree)
    for name in tree["stages"]:
        run_stage(recipe, name, tmp_path)
        lines = (tmp_path / "tiny" / name / "metrics.jsonl").read_text().splitlines()
        counts = json.loads((tmp_path / "tiny" / name / "manifest.json").read_text())["data"]["counts"]
        assert len(lines) == counts["steps"] > 2


def test_two_processes_are_one_that_accumulates(tiny_base: Path, tmp_path: Path) -> None:
    words = {
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "random",
        TOKENS: 260,
    }  # makes six, whole for both
    tree = tree_of(tiny_base, tmp_path, "sft", max_steps=2, **words)
    section = tree["stages"]["sft"]
    alone = {**section, "train": {**section["train"], "gradient_accumulation_steps": 2}}
    one, _, _ = trained({**tree, "stages": {"sft": alone}}, tmp_path / "one", "sft")
    path = write_recipe(tree, tmp_path / "two.yaml")
    launch_stage(2, path, "sft", tmp_path / "two")
    two = load_file(tmp_path / "two/tiny/sft/adapter/adapter_model.safetensors")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5


def test_pairs_on_several_processes_are_refused(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL gathers the rewards of each process's pairs, as many of one as of the other."""
    monkeypatch.setattr(trl.DPOConfig, "world_size", 2)
    monkeypatch.setattr(trl.DPOConfig, TOKENS, 500, raising=False)
    with pytest.raises(UserError, match=f"{TOKENS} gives each of 2 processes .* Say per_device_train_batch_size"):
        a_trainer(tiny_base, tmp_path, "dpo")


def test_the_plan_counts_the_steps_and_tokens_that_are_trained(tiny_base: Path, tmp_path: Path) -> None:
    words = {"max_length": 16, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    given = {word: value for word, value in words.items() if word != "max_length"}
    trainer = of_lengths(tiny_base, tmp_path, [16] * 23, save_strategy="no", **given)
    setattr(trainer.args, TOKENS, 40)
    trainer.train()
    shapes = shapes_of(json.loads((tiny_base / "config.json").read_text()))
    section = STAGES["sft"].section(data=DataSpec(path="x"), train={**words, TOKENS: 40})
    lengths, arguments = Lengths([16] * 23), STAGES["sft"].arguments(section)
    work = work_of(STAGES["sft"], section, Model(shapes, Adapter()), ModelSpec(base="x"), lengths)
    batches = len(_batches(arguments, 16, 1, lengths))
    assert batches == 12 and trainer.state.global_step == 3 * batches // 2
    assert work.length == 16 and 40 <= work.tokens < 40 + 16
    passes = _passes(arguments, work, 1, lengths)
    assert passes is not None and round(passes * work.tokens) == 3 * 23 * 16
    alone = work_of(STAGES["dpo"], section, Model(shapes, Adapter()), ModelSpec(base="x"), lengths)
    assert (alone.rows, alone.length) == (2 * 2, 16)  # 40 tokens are more than a pair of 32


def test_the_longest_batch_that_is_tried_is_the_heaviest(tiny_base: Path, tmp_path: Path) -> None:
    trainer = of_lengths(tiny_base, tmp_path, [10, 60, 10, 10, 20, 20, 20, 90], train_sampling_strategy="sequential")
    setattr(trainer.args, TOKENS, 90)
    trainer.create_optimizer()
    tried: list[torch.Size] = []
    trainer._in_parts = lambda model, inputs, items: tried.append(inputs["input_ids"].shape)
    trainer._probe(trainer.model)
    assert tried == [torch.Size([4, 60])]  # 240 tokens with padding: more than the 90 of the longest row


@pytest.mark.parametrize(
    ("stage", "train", "why"),
    [
        ("sft", {"per_device_train_batch_size": 4}, "per_device_train_batch_size: counts a batch in rows"),
        ("sft", {"packing": True}, f"packing: is True, which does not go with {TOKENS}"),
        ("dpo", {"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy: is 'batch_rebalance'"),
        ("pretrain", {}, f"{TOKENS}: is for batches of whole rows, .* packing: false"),
        ("reward", {TOKENS: "auto"}, f"{TOKENS}: is 'auto', expected a whole number"),
        ("reward", {TOKENS: 0}, f"{TOKENS}: is 0, expected a whole number of at least 1"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(
    tiny_base: Path, tmp_path: Path, stage: str, train: dict[str, Any], why: str
) -> None:
    tree = tiny_tree(tiny_base, tmp_path)
    tree["stages"][stage]["train"] = {TOKENS: 512, **train}
    with pytest.raises(UserError, match=f"stages.{stage}.train.{why}"):
        build(tree)
