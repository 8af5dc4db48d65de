"""A reward model's score: read at the last token whatever its id, in float32, alike wherever it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import head, tiny_tree
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from pipeline.data import render
from pipeline.measure import scoring
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.spec import ModelSpec
from pipeline.ppo.actors import Actors
from pipeline.publish.adapter import pad_that_ends_nothing
from pipeline.recipe.recipe import build
from pipeline.runs.stage import run_stage
from pipeline.training import sequences
from pipeline.training import trainer as shared

CLOSES_WITH_PAD = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUESTIONS = [("Where is Tolva?", "North of Isket.", "I will not say, so ask somebody else."), ("Hi", "Hello!", "No.")]


def turns(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in QUESTIONS],
    "template": [
        {"prompt": turns("user", p), "chosen": turns("assistant", c), "rejected": turns("assistant", r)}
        for p, c, r in QUESTIONS
    ],
}


def spec(base: Path, folder: Path, form: str, dtype: str) -> ModelSpec:
    template = folder / "closes.jinja"
    template.write_text(CLOSES_WITH_PAD)
    words = {"chat_template": str(template)} if form == "template" else {}
    return ModelSpec(base=str(base), dtype=dtype, quantize="none", lora=LORA, **words)  # type: ignore[arg-type]


def reward_model(model_spec: ModelSpec) -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = bases.load_tokenizer(model_spec)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the trap"
    model = adapters.fresh(bases.load_base(model_spec, tokenizer, num_labels=1), LORA, head=True)
    with torch.no_grad():
        for name, weight in adapters.trainable(model).items():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    return model, tokenizer


@torch.no_grad()
def plain_loop(model: Any, rows: list[list[int]]) -> list[float]:
    """head(hidden[len - 1]) in float32, one sequence after the other."""
    classifier = model.eval().get_base_model()
    weight_1H = classifier.score.modules_to_save["default"].weight
    assert weight_1H.dtype is torch.float32
    found = []
    for ids in rows:
        with bases.computing(model):
            hidden_BTH = classifier.model(input_ids=torch.tensor([ids])).last_hidden_state
        found.append((weight_1H[0] * hidden_BTH[0, len(ids) - 1].float()).sum().item())
    return found


@pytest.mark.parametrize("form", ["text", "template"])
def test_a_score_is_read_at_the_last_token_though_it_is_the_pad_token(
    tiny_base: Path, tmp_path: Path, form: str
) -> None:
    model_spec = spec(tiny_base, tmp_path, form, "float32")
    model, tokenizer = reward_model(model_spec)
    pairs = [
        (render.conversation(tokenizer, row, "chosen"), render.conversation(tokenizer, row, "rejected"))
        for row in ROWS[form]
    ]
    rows = [ids for pair in pairs for ids in pair]
    assert all(ids[-1] == tokenizer.pad_token_id for ids in rows) and len({len(ids) for ids in rows}) > 1
    wanted = plain_loop(model, rows)

    args = RewardConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", per_device_train_batch_size=2, bf16=False
    )
    args.checkpointed_layers, args.base_on_hub = None, None
    data = sequences.SCORED_PAIRS.write(pairs)
    trainer = shared.build(RewardTrainer, model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    _, out = trainer.compute_loss(model.train(), batch, return_outputs=True)
    assert out.logits.squeeze(1).tolist() == pytest.approx(wanted[0::2] + wanted[1::2], abs=1e-5), "training"

    assert scoring.scores(model, tokenizer, rows) == pytest.approx(wanted, abs=1e-5), "evaluation"

    adapters.save(model, tmp_path / "adapter")
    policy = adapters.fresh(bases.load_base(model_spec, tokenizer), LORA)
    heads = {"reward": adapters.borrowed(policy, "reward", tmp_path / "adapter")}
    actors = Actors(policy, tokenizer.pad_token_id, 1.0, "trunk", heads)  # type: ignore[arg-type]
    assert actors.scores("reward", rows, 4) == pytest.approx(wanted, abs=1e-5), "ppo"

    # As a user of transformers alone reads it, with the pad token that is published: one by one and padded.
    from peft import PeftModel

    tokenizer.pad_token_id = pad_that_ends_nothing(tokenizer)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        together = plain(**tokenizer.pad({"input_ids": rows}, return_tensors="pt")).logits.squeeze(1)
        alone = [plain(torch.tensor([ids])).logits.item() for ids in rows]
    assert together.tolist() == pytest.approx(wanted, abs=1e-5), "transformers, padded"
    assert alone == pytest.approx(wanted, abs=1e-5), "transformers, one by one"


def test_a_pad_token_that_ends_nothing(tiny_base: Path) -> None:
    tokenizer = bases.load_tokenizer(ModelSpec(base=str(tiny_base)))
    assert tokenizer.decode([pad_that_ends_nothing(tokenizer)]) == "<|endoftext|>"
    tokenizer.pad_token = "<|endoftext|>"
    assert tokenizer.decode([pad_that_ends_nothing(tokenizer)]) == "<|endoftext|>", "one that is right is kept"
    tokenizer.chat_template = CLOSES_WITH_PAD.replace("<|im_end|>", "<|endoftext|>").replace("<|im_start|>", "")
    assert tokenizer.decode([pad_that_ends_nothing(tokenizer)]) == "<|im_start|>"
    tokenizer.chat_template = CLOSES_WITH_PAD.replace("<|im_end|>{%", "<|endoftext|>{%")
    assert pad_that_ends_nothing(tokenizer) is None, "every special token stands in a dialogue"


@pytest.mark.parametrize("form", ["text", "template"])
def test_ppo_takes_the_reward_model_of_such_pairs(tiny_base: Path, tmp_path: Path, form: str) -> None:
    """The scores that the reward stage noted are those through its borrowed adapter, in bfloat16 and NF4."""
    tree = tiny_tree(tiny_base, tmp_path)
    rows, prompts = (
        [json.loads(line) for line in Path(head(file, 12, tmp_path / "head.jsonl")).read_text().splitlines()]
        for file in ("comparisons.jsonl", "prompts.jsonl")
    )
    if form == "text":
        rows = [
            {"prompt": row["prompt"][0]["content"], **{k: " " + row[k][0]["content"] for k in ("chosen", "rejected")}}
            for row in rows
        ]
        prompts = [{"prompt": row["prompt"][0]["content"]} for row in prompts]
    for name, some in (("p", rows), ("q", prompts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    if form == "template":
        (tmp_path / "closes.jinja").write_text(CLOSES_WITH_PAD)
        tree["model"]["chat_template"] = str(tmp_path / "closes.jinja")
    pairs = {"path": str(tmp_path / "p.jsonl")}
    small = {"steps": 1, "batch_size": 4, "per_device_train_batch_size": 4, "response_length": 4}
    tree["stages"] = {
        "reward": {"data": pairs, "train": {"max_steps": 2, "learning_rate": 1e-2}},
        "sft": {"data": {"path": str(tmp_path / "dialogues.jsonl")}, "train": {"max_steps": 1}},
        "ppo": {"from": "sft", "reward": "reward", "data": {"path": str(tmp_path / "q.jsonl")}, "train": small},
    }
    recipe = build(tree)
    for name in recipe.order():
        run_stage(recipe, name, tmp_path / "runs")
    found = recipe.artifact("ppo", tmp_path / "runs").finished().invariants
    assert found["borrowed_score_difference_reward"] == 0.0


def test_scores_are_not_rounded_to_bfloat16(tiny_base: Path, tmp_path: Path) -> None:
    """Nor in training, nor in PPO: in bfloat16 the scores of these sequences would be a few alike values."""
    model_spec = spec(tiny_base, tmp_path, "text", "bfloat16")
    model, tokenizer = reward_model(model_spec)
    with torch.no_grad():
        model.get_base_model().score.modules_to_save["default"].weight.mul_(30)
    rows = [render.conversation(tokenizer, {"prompt": "One", "said": f" {n}"}, "said") for n in range(40)]
    wanted = plain_loop(model, rows)
    read = {"evaluation": [scoring.scores(model, tokenizer, [ids])[0] for ids in rows]}
    with bases.computing(model.train()):
        read["training"] = [model(input_ids=torch.tensor([ids])).logits.item() for ids in rows]
    adapters.save(model.eval(), tmp_path / "adapter")
    policy = adapters.fresh(bases.load_base(model_spec, tokenizer), LORA)
    heads = {"reward": adapters.borrowed(policy, "reward", tmp_path / "adapter")}
    actors = Actors(policy, tokenizer.pad_token_id, 1.0, "trunk", heads)  # type: ignore[arg-type]
    read["ppo"] = [actors.scores("reward", [ids], 1)[0] for ids in rows]
    rounded = torch.tensor(wanted).bfloat16().float()
    assert (rounded - torch.tensor(wanted)).abs().max() > 1e-3, "what a rounded score would be off by"
    for where, scores in read.items():
        assert scores == pytest.approx(wanted, abs=1e-5), where


def test_ties_count_half() -> None:
    from pipeline.measure.ranking import over_longer

    assert scoring.ranking([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 3.0, 1.0], "right", "margin")["right"] == 0.5
    assert over_longer([0.0, 1.0], [1, 1], [1, 1]).value == 0.25, "0.75 right against one half"
