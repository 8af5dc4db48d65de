"""What TRL trains on through our encoder equals the formulas, written out by hand on the same weights."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import tiny_tree
from safetensors.torch import load_file
from scipy import stats
from torch.nn.functional import log_softmax, logsigmoid

from pipeline.data import render
from pipeline.data.contracts import PREFERENCE
from pipeline.data.load import DataSpec, read_source
from pipeline.disk import metrics
from pipeline.errors import BrokenInvariant
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.stage import run_stage

ONE_STEP = {"max_steps": 1, "save_steps": 10, "lr_scheduler_type": "constant", "gradient_checkpointing": False}


def one_stage(base: Path, folder: Path, kind: str, limit: int | None = None, **train: Any) -> Recipe:
    tree = tiny_tree(base, folder, name=f"{kind}-{len(list(folder.iterdir()))}")
    data = {"path": tree["stages"][kind]["data"]["path"], "limit": limit}
    tree["stages"] = {kind: {"data": data, "train": {**ONE_STEP, **train}}}
    tree["model"]["dtype"] = "float32"
    tree["train"] = {"max_length": 256, "logging_steps": 1}
    return build(tree)


def first_loss(recipe: Recipe, folder: Path) -> float:
    stage = recipe.order()[0]
    run_stage(recipe, stage, folder)
    return float(metrics.read(recipe.artifact(stage, folder).metrics)[0]["loss"])


def weights(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(recipe.artifact(recipe.order()[0], folder).adapter / adapters.WEIGHTS)


def test_accumulated_steps_equal_one_large_batch(tiny_base: Path, tmp_path: Path) -> None:
    """Dialogues of unequal length: a mean of means would weigh their tokens wrongly."""
    folders = [("whole", 8, 1), ("split", 1, 8)]
    for name, _, _ in folders:
        (tmp_path / name).mkdir()
    runs = [
        one_stage(
            tiny_base,
            tmp_path / name,
            "sft",
            limit=8,
            per_device_train_batch_size=b,
            gradient_accumulation_steps=g,
            learning_rate=1e-3,
        )
        for name, b, g in folders
    ]
    losses = [first_loss(recipe, tmp_path / name) for recipe, (name, _, _) in zip(runs, folders, strict=True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    whole, split = (weights(recipe, tmp_path / name) for recipe, (name, _, _) in zip(runs, folders, strict=True))
    assert all(torch.allclose(whole[name], split[name], atol=1e-4) for name in whole)


def test_packed_equals_unpacked(tiny_base: Path, tmp_path: Path) -> None:
    """Four documents in one packed row give the loss they give in rows of their own: no neighbour is looked at."""
    losses = {}
    for packing in (True, False):
        recipe = one_stage(
            tiny_base, tmp_path, "pretrain",
            limit=4, packing=packing, per_device_train_batch_size=1 if packing else 4, max_length=1024,
        )  # fmt: skip
        losses[packing] = first_loss(recipe, tmp_path)
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


def pairs(recipe: Recipe, kind: str, tokenizer: Any) -> list[tuple[render.Reply, render.Reply]]:
    path = recipe.stages[kind].data.path
    rows = read_source(path, PREFERENCE, DataSpec(path=path)).rows
    return [render.pair(tokenizer, row) for row in rows]


TALKS = [
    {
        "prompt": [{"role": "user", "content": "How far is it?"}],
        "chosen": [
            {"role": "assistant", "content": "From where?"},
            {"role": "user", "content": "From the old harbour, of course."},
            {"role": "assistant", "content": "Two miles."},
        ],
        "rejected": [
            {"role": "assistant", "content": "Far."},
            {"role": "user", "content": "How far?"},
            {"role": "assistant", "content": "Very."},
            {"role": "user", "content": "In miles, I mean"},
            {"role": "assistant", "content": "I do not know"},
        ],
    },
    {
        "prompt": [{"role": "user", "content": "Add 2"}],
        "chosen": [
            {
                "role": "assistant",
                "content": "I ask.",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
            },
            {"role": "tool", "name": "add", "content": "4711 is what came out"},
            {"role": "assistant", "content": "It is done."},
        ],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]
CALLING = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls %}{{ call.function.name }}{% endfor -%}
{{- '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
SPOKEN = [
    (
        ["From where?<|im_end|>", "Two miles.<|im_end|>"],
        ["Far.<|im_end|>", "Very.<|im_end|>", "I do not know<|im_end|>"],
    ),
    (["I ask.add<|im_end|>", "It is done.<|im_end|>"], ["No.<|im_end|>"]),
]


def spoken_by_hand(model: Any, tokenizer: Any, row: dict[str, Any], key: str) -> tuple[torch.Tensor, int]:
    """log pi of what the assistant says in an answer, and how many tokens that is: ChatML written out turn by turn."""
    ids: list[int] = []
    learnt: list[int] = []
    for message in row["prompt"] + row[key]:
        says = message["role"] == "assistant" and message in row[key]
        said = message["content"] + "".join(call["function"]["name"] for call in message.get("tool_calls", []))
        for text, counts in ((f"<|im_start|>{message['role']}\n", False), (f"{said}<|im_end|>", says), ("\n", False)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            learnt += range(len(ids), len(ids) + len(piece)) if counts else []
            ids += piece
    logp_TV = log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), dim=-1)
    return sum(logp_TV[t - 1, ids[t]] for t in learnt), len(learnt)  # type: ignore[return-value]


def test_dpo_learns_only_what_the_assistant_says(tiny_base: Path, tmp_path: Path) -> None:
    """Answers of several messages: loss, held-out numbers and what `onebase data --show` paints are over the
    assistant's tokens, not over what the user or a tool says between them."""
    from trl import DPOConfig, DPOTrainer

    from pipeline.measure import scoring
    from pipeline.stages import dpo
    from pipeline.training import sequences
    from pipeline.training import trainer as shared

    spec = one_stage(tiny_base, tmp_path, "dpo").spec.model
    tokenizer = bases.load_tokenizer(spec)
    tokenizer.chat_template = CALLING
    torch.manual_seed(0)
    model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora)
    some = [render.pair(tokenizer, row) for row in TALKS]
    args = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=2
    )
    trainer = shared.build(
        type("DPOTrainer", (shared.TakesEncoded, DPOTrainer), {}), model, args=args,
        train_dataset=sequences.REPLY_PAIRS.write(some), processing_class=tokenizer,
        data_collator=shared.LearntTokens(tokenizer.pad_token_id),
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".default." in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))).item()
        told = {}
        for adapter in ("ref", "default"):
            model.set_adapter(adapter)
            told[adapter] = [
                [spoken_by_hand(model, tokenizer, row, key) for key in ("chosen", "rejected")] for row in TALKS
            ]
    margins = [(p[0][0] - r[0][0]) - (p[1][0] - r[1][0]) for p, r in zip(told["default"], told["ref"], strict=True)]
    assert max(abs(margin) for margin in margins) > 0.01
    assert theirs == pytest.approx(torch.stack([-logsigmoid(0.3 * m) for m in margins]).mean().item(), abs=1e-4)
    means = [[(total / count).item() for total, count in pair] for pair in told["default"]]
    held_out = scoring.preferences(model, tokenizer, some)
    assert held_out["preference_margin"] == pytest.approx(sum(w - v for w, v in means) / 2, abs=1e-4)
    for row, spoken in zip(TALKS, SPOKEN, strict=True):
        for sequence, turns in zip(dpo.encode(tokenizer, row), spoken, strict=True):
            assert tokenizer.decode([label for label in sequence.labels if label != render.IGNORED]) == "".join(turns)


def by_hand(model: Any, reply: render.Reply) -> torch.Tensor:
    """log pi(y | x): one row, no padding, the whole softmax (the sum in eq. 7 of arXiv 2305.18290)."""
    ids_T = torch.tensor(reply.prompt_ids + reply.reply_ids)
    logp_TV = log_softmax(model(input_ids=ids_T[None]).logits[0].float(), dim=-1)
    start = len(reply.prompt_ids)
    return sum(logp_TV[t - 1, ids_T[t]] for t in range(start, len(ids_T)))  # type: ignore[return-value]


def dpo_trainer(
    base: Path, folder: Path, moved: float = 0.0, batch: int = 6, **train: Any
) -> tuple[list[tuple[render.Reply, render.Reply]], Any]:
    """The stage's trainer, on a policy that has moved so far from the base before its reference was copied."""
    from trl import DPOConfig, DPOTrainer

    from pipeline.training import sequences
    from pipeline.training import trainer as shared

    recipe = one_stage(base, folder, "dpo")
    spec = recipe.spec.model
    tokenizer = bases.load_tokenizer(spec)
    torch.manual_seed(0)
    model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora)
    shift(model, moved)
    args = DPOConfig(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=batch, **train
    )
    taking = type("DPOTrainer", (shared.TakesEncoded, DPOTrainer), {})
    some = pairs(recipe, "dpo", tokenizer)[:batch]
    rows = sequences.REPLY_PAIRS.write(some)
    return some, shared.build(taking, model, args=args, train_dataset=rows, processing_class=tokenizer)


def shift(model: Any, by: float) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".default." in name:
                weight.add_(torch.randn_like(weight) * by)


def dpo_settings() -> list[dict[str, Any]]:
    """Every loss of the installed TRL, and what else changes the value of a loss."""
    from trl import DPOTrainer

    losses = re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss))
    assert {"sigmoid", "ipo", "sft", "aot"} <= set(losses)
    alone = [{"loss_type": [loss], **({"label_smoothing": 0.1} if loss == "exo_pair" else {})} for loss in losses]
    mixed: list[dict[str, Any]] = [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_weights": [0.5]},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"f_divergence_type": "js_divergence"},
        {"precompute_ref_log_probs": True},
        {"beta": 1e-4},
    ]
    return [*alone, *mixed]


@pytest.mark.parametrize("train", dpo_settings(), ids=lambda train: "-".join(map(str, [*train, *train.values()][:2])))
def test_dpo_may_start_under_every_loss_and_under_none_from_another_reference(
    tiny_base: Path, tmp_path: Path, train: dict[str, Any]
) -> None:
    from pipeline.training import invariants

    _, trainer = dpo_trainer(tiny_base, tmp_path, moved=0.05, batch=2, **train)
    found = invariants.reference_is_the_start(trainer)
    assert found["step_0_log_ratio"] < 1e-4 and abs(found["step_0_margin"]) < 1e-4
    shift(trainer.model, 0.02)
    with pytest.raises(BrokenInvariant, match="a reference that is not the policy"):
        invariants.reference_is_the_start(trainer)


def test_dpo_loss_equals_the_formula(tiny_base: Path, tmp_path: Path) -> None:
    """-log sigmoid(beta * ((log pi_w - log ref_w) - (log pi_l - log ref_l))), arXiv 2305.18290 eq. 7, with a policy
    that has moved away from its reference."""
    some, trainer = dpo_trainer(tiny_base, tmp_path, beta=0.3)
    model = trainer.model
    shift(model, 0.05)
    model.eval()
    with torch.no_grad():
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        theirs = trainer.compute_loss(model, batch).item()
        model.set_adapter("default")
        policy = [[by_hand(model, reply) for reply in pair] for pair in some]
        model.set_adapter("ref")
        reference = [[by_hand(model, reply) for reply in pair] for pair in some]
    margins = [(p[0] - r[0]) - (p[1] - r[1]) for p, r in zip(policy, reference, strict=True)]
    assert max(abs(margin) for margin in margins) > 0.01
    ours = torch.stack([-logsigmoid(0.3 * margin) for margin in margins]).mean().item()
    assert theirs == pytest.approx(ours, abs=1e-4)


def test_first_reward_loss_equals_bradley_terry(tiny_base: Path, tmp_path: Path) -> None:
    """-log sigmoid(r_w - r_l) + c (r_w + r_l)^2 (InstructGPT eq. 1, with TRL's centering term)."""
    recipe = one_stage(
        tiny_base, tmp_path, "reward",
        per_device_train_batch_size=24, learning_rate=1e-7, center_rewards_coefficient=0.01,
    )  # fmt: skip
    theirs = first_loss(recipe, tmp_path)
    spec = recipe.spec.model
    tokenizer = bases.load_tokenizer(spec)
    model = adapters.fresh(bases.load_base(spec, tokenizer, num_labels=1), spec.lora, head=True).eval()
    with torch.no_grad():
        for name, tensor in weights(recipe, tmp_path).items():
            part, _, last = name.rpartition(".")
            part = part.replace(".score", ".score.modules_to_save")
            model.get_parameter(f"{part}.default.{last}").copy_(tensor)
        path = recipe.stages["reward"].data.path
        rows = read_source(path, PREFERENCE, DataSpec(path=path)).rows
        score = lambda row, key: model(  # noqa: E731
            input_ids=torch.tensor([render.conversation(tokenizer, row, key)])
        ).logits.item()
        scored = [(score(row, "chosen"), score(row, "rejected")) for row in rows]
    ours = sum(-logsigmoid(torch.tensor(w - v)).item() + 0.01 * (w + v) ** 2 for w, v in scored) / len(scored)
    assert theirs == pytest.approx(ours, abs=1e-4)


def test_held_out_numbers_equal_plain_loops(tiny_base: Path, tmp_path: Path) -> None:
    """Batched, padded, partial logits against one row at a time."""
    from pipeline.measure import scoring

    recipe = one_stage(tiny_base, tmp_path, "dpo")
    spec = recipe.spec.model
    tokenizer = bases.load_tokenizer(spec)
    model = adapters.fresh(bases.load_base(spec, tokenizer), spec.lora).eval()
    some = pairs(recipe, "dpo", tokenizer)
    with torch.no_grad():
        plain = [[by_hand(model, reply).item() for reply in pair] for pair in some]
    batched = scoring.log_likelihoods(model, tokenizer, [reply.sequence() for pair in some for reply in pair])
    assert batched == pytest.approx([value for pair in plain for value in pair], abs=1e-3)
    found = scoring.preferences(model, tokenizer, some)
    a_token = [
        [total / len(reply.reply_ids) for total, reply in zip(totals, pair, strict=True)]
        for totals, pair in zip(plain, some, strict=True)
    ]
    assert found["preference_accuracy"] == sum(w > v for w, v in a_token) / len(a_token)
    texts = [render.document(tokenizer, json.dumps(n)) for n in range(100, 900, 100)]
    found = scoring.language_model(model, tokenizer, texts)
    loss = found["loss"]
    with torch.no_grad():
        each = [by_hand(model, render.Reply(text.ids[:1], text.ids[1:], text.ids[1:])).item() for text in texts]
    assert loss == pytest.approx(-sum(each) / sum(len(text.ids) - 1 for text in texts), abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    nats, tokens = -numpy.array(each), numpy.array([len(text.ids) - 1 for text in texts])
    by_scipy = stats.bootstrap(
        (nats, tokens), lambda n, t, axis: n.sum(axis) / t.sum(axis), paired=True, method="percentile", rng=0
    ).confidence_interval
    room = 0.1 * (by_scipy.high - by_scipy.low)  # two draws of a few thousand
    assert found["loss_low"] == pytest.approx(by_scipy.low, abs=room)
    assert found["loss_high"] == pytest.approx(by_scipy.high, abs=room)
    assert scoring.language_model(model, tokenizer, texts[:1]).keys() == {"loss", "perplexity"}
