"""GRPO and its kin: TRL's own losses, advantages by plain loops, and the gradients of a whole step by plain torch."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import launch_stage, on_two_processes, write_recipe
from pydantic import ValidationError
from safetensors.torch import load_file
from test_ppo import ROWS, length, spec
from test_ppo import trainer as ppo_trainer
from test_ppo_stage import parents, ppo_tree  # noqa: F401
from trl import GRPOTrainer as TRLsGRPOTrainer
from trl import RLOOTrainer

from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.ppo import groups, rewards
from pipeline.ppo.actors import REFERENCE, Actors
from pipeline.ppo.grpo import GRPOTrainer
from pipeline.ppo.grpo_settings import GRPOSettings
from pipeline.ppo.health import WINDOW, Health
from pipeline.ppo.settings import PPOSettings

LENGTHS = [5, 2, 7, 1]
SCORES = [0.0, 1.0, 1.0, 0.5, 2.0, 2.0, 2.0, 2.0]


def trainer(base: Path, reward: Any = length, **settings: Any) -> GRPOTrainer:
    """Around a policy that has moved away from its reference."""
    torch.manual_seed(0)
    model_spec = spec(base, "float32", "nf4")
    tokenizer = bases.load_tokenizer(model_spec)
    model = adapters.fresh(bases.load_base(model_spec, tokenizer), model_spec.lora)
    adapters.twin(model, REFERENCE)
    with torch.no_grad():
        for name, weight in adapters.trainable(model).items():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    fixed = {"max_completion_length": 8, "gradient_checkpointing": False, "num_generations": 4}
    chosen = GRPOSettings(**{**fixed, "generation_batch_size": 8, **settings})
    actors = Actors(model, tokenizer.pad_token_id, chosen.temperature, chosen.critic, {})
    return GRPOTrainer(actors, tokenizer, ROWS, [rewards.Source("test.py:reward", 1.0, function=reward)], chosen, 3)


def collect(grpo: GRPOTrainer) -> tuple[Any, Any, dict[str, float]]:
    rollout = grpo.rollout(0)
    rollout, by_source = grpo.choose(rollout, grpo.ask_sources(rollout))
    scored = grpo.score(rollout.episodes, rewards.total(grpo.sources, by_source))
    return rollout, *grpo.take_advantages(rollout.episodes, scored)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_scores_within_their_group(scale: Any) -> None:
    spread = statistics.stdev(SCORES)
    found = groups.advantages(torch.tensor(SCORES, dtype=torch.float64), 4, scale, spread)
    for place, score in enumerate(SCORES):
        group = SCORES[place - place % 4 : place - place % 4 + 4]
        divisor = {"group": statistics.stdev(group) + 1e-4, "batch": spread + 1e-4, "none": 1.0}[scale]
        assert found[place].item() == pytest.approx((score - statistics.mean(group)) / divisor)
    tenths = torch.tensor([*SCORES[:4], *[0.1] * 4], dtype=torch.float64)
    assert groups.alike(tenths, 4).tolist() == [False, True]
    left_out = groups.leave_one_out(torch.tensor(SCORES, dtype=torch.float64), 4)
    assert left_out[1].item() == pytest.approx(1.0 - (0.0 + 1.0 + 0.5) / 3)


@pytest.mark.parametrize(
    ("loss_type", "level", "beta", "delta"),
    [
        ("grpo", "token", 0.0, None), ("grpo", "token", 0.3, None), ("grpo", "token", 0.0, 1.3),
        ("dr_grpo", "token", 0.3, None), ("dapo", "token", 0.3, None), ("gspo", "sequence", 0.3, None),
        ("rloo", "sequence", 0.0, None),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_trls(loss_type: Any, level: str, beta: float, delta: float | None) -> None:
    """On the same log-probabilities, several of them outside the clip range."""
    draw = torch.Generator().manual_seed(5)
    mask = torch.tensor([[float(place < count) for place in range(max(LENGTHS))] for count in LENGTHS])
    old, reference = (-torch.rand(mask.shape, generator=draw) * 3 for _ in range(2))
    ours = (old + torch.randn(mask.shape, generator=draw) * 0.4).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    gains = torch.tensor([1.0, -0.5, 0.3, -2.0])

    settings = GRPOSettings(loss_type=loss_type, beta=beta, delta=delta, epsilon=0.2, epsilon_high=0.28)
    weights = groups.weights(mask, loss_type, len(LENGTHS), float(mask.sum()), 16)
    loss, _ = groups.policy_loss(ours, old, gains, weights, level=settings.ratio_level, clip=(0.2, 0.28), delta=delta)
    loss = loss + beta * groups.kl_loss(ours, reference, weights)

    ones = torch.ones_like(mask)
    inputs = {
        "prompt_ids": torch.zeros(4, 1), "prompt_mask": torch.ones(4, 1), "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask, "advantages": gains, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    plain = SimpleNamespace(gather=lambda tensor: tensor, num_processes=1, reduce=lambda tensor, reduction: tensor)
    trl: Any = SimpleNamespace(
        loss_type="grpo" if loss_type == "gspo" else loss_type, importance_sampling_level=level, beta=beta,
        epsilon_low=0.2, epsilon_high=0.28, max_completion_length=16, current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=False,
        _entropy_bonus_enabled=False, accelerator=plain, model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (theirs, ones, None),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    kind: Any = RLOOTrainer if loss_type == "rloo" else TRLsGRPOTrainer
    trls = kind._compute_loss(trl, None, inputs)
    assert loss.item() == pytest.approx(trls.item(), abs=1e-6)
    loss.backward()
    trls.backward()
    assert torch.allclose(ours.grad, theirs.grad * mask, atol=1e-6)  # type: ignore[arg-type,operator]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "rloo"])
def test_a_step_has_the_gradients_of_plain_passes_over_each_answer(tiny_base: Path, loss_type: Any) -> None:
    """Packs, shared prompts, groups, weights and KL against one unpacked forward pass for each answer."""
    grpo = trainer(tiny_base, loss_type=loss_type, beta=0.2, per_device_train_batch_size=4, temperature=0.8)
    rollout, batch, numbers = collect(grpo)
    assert [row["prompt"] for row in rollout.rows[:4]] == 4 * [rollout.rows[0]["prompt"]]
    model = grpo.actors.model
    grpo.run_backward(batch, 1.0)
    found = {name: weight.grad.clone() for name, weight in grpo.actors.trained("policy").items()}  # type: ignore[union-attr]
    model.zero_grad()

    def logps(episode: Any, adapter: str) -> torch.Tensor:
        grpo.actors.act_as(adapter)
        ids = torch.tensor([episode.prompt_ids + episode.answer_ids])
        logits = type(model.get_base_model()).forward(model.get_base_model(), input_ids=ids).logits[0] / 0.8
        start = len(episode.prompt_ids)
        return torch.log_softmax(logits[start - 1 : -1], -1).gather(1, ids[0, start:, None])[:, 0]

    episodes, paid = rollout.episodes, [float(len(text)) for text in rollout.texts]
    with torch.no_grad():
        references = [logps(episode, REFERENCE) for episode in episodes]
    policies = [logps(episode, "default") for episode in episodes]
    kls = [float((p.detach() - r).sum()) for p, r in zip(policies, references, strict=True)]
    tokens, loss = sum(len(e.answer_ids) for e in episodes), torch.zeros(())
    for place, (policy, reference) in enumerate(zip(policies, references, strict=True)):
        group = range(place - place % 4, place - place % 4 + 4)
        if loss_type == "rloo":
            worth = [paid[i] - 0.2 * kls[i] for i in group]
            own = worth[place % 4]
            loss = loss - (own - (sum(worth) - own) / 3) * torch.exp(policy - policy.detach()).prod() / 8
            continue
        gain = (paid[place] - statistics.mean(paid[i] for i in group)) / (
            statistics.stdev(paid[i] for i in group) + 1e-4
        )
        each = -gain * torch.exp(policy - policy.detach())
        each = each + 0.2 * (torch.exp(reference - policy) - (reference - policy) - 1)
        loss = loss + (each.sum() / tokens if loss_type == "dapo" else each.mean() / 8)
    loss.backward()
    for name, weight in grpo.actors.trained("policy").items():
        assert torch.allclose(found[name], weight.grad, rtol=1e-3, atol=2e-5), name  # type: ignore[arg-type]
    assert numbers["kl"] == pytest.approx(statistics.mean(kls), abs=1e-3)
    assert numbers["reward"] == pytest.approx(statistics.mean(paid))
    assert numbers["reward_std"] == pytest.approx(statistics.stdev(paid))


def test_groups_that_are_all_alike_make_way_for_others(tiny_base: Path) -> None:
    """The first of two groups is all alike. It is replaced, and only by a group that differs."""
    asked: list[list[Any]] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        asked.append(prompts)
        if len(asked) == 1:
            return [0.0] * 4 + [0.0, 1.0, 0.0, 1.0]
        return [float(len(asked) == 3 and place % 2) for place in range(len(prompts))]

    grpo = trainer(tiny_base, reward, max_num_gen_batches=3)
    first = grpo.rollout(0)
    rollout, _, numbers = collect(grpo)
    assert [len(prompts) for prompts in asked] == [8, 4, 4]
    assert list(asked[2]) == [row["prompt"] for row in rollout.rows[:4]]
    assert rollout.texts[4:] == first.texts[4:]
    assert len({str(prompts[0]) for prompts in asked} | {str(asked[0][4])}) == 4, "prompts that the step has not asked"
    assert numbers["frac_reward_zero_std"] == 0.0
    asked.clear()
    assert collect(trainer(tiny_base, reward))[2]["frac_reward_zero_std"] == 0.5
    assert len(asked) == 1


def test_cut_answers_teach_nothing_or_cost_something(tiny_base: Path) -> None:
    """Of a random model nearly all answers are cut at 8 tokens."""
    masked = trainer(tiny_base, mask_truncated_completions=True)
    rollout, batch, _ = collect(masked)
    cut = [not episode.ended for episode in rollout.episodes]
    assert any(cut)
    for one in batch:
        for place, row in enumerate(one.pack.rows):
            assert (one.weights_BG[place].sum() == 0) == cut[row]
    lengths = [len(episode.answer_ids) for episode in rollout.episodes]
    lost = [min(max((count - 5) / 3, 0), 1) for count in lengths]
    paid = [len(text) - lost[place] for place, text in enumerate(rollout.texts)]
    assert collect(trainer(tiny_base, soft_punish_cache=3))[2]["reward"] == pytest.approx(statistics.mean(paid))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"generation_batch_size": 30, "num_generations": 8}, "30 is not a multiple of num_generations 8"),
        ({"max_steps": 5, "num_iterations": 2}, "max_steps 5 is not a multiple of num_iterations 2"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "Use loss_type gspo"),
        ({"num_generations": 1}, "greater than or equal to 2"),
        ({"cliprange": 0.2}, "Extra inputs are not permitted"),
    ],
)
def test_what_makes_no_sense_is_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        GRPOSettings(**said)


def test_a_reward_that_is_alike_in_all_groups_stops_the_run() -> None:
    health = Health(GRPOSettings())
    step = dict.fromkeys(("entropy", "answer_length", "reward", "eos_share", "empty_share"), 0.5)
    step |= {"score": 0.5, "score_std": 0.1, "grad_norm": 0.0, "frac_reward_zero_std": 1.0}
    told = [health.verdict(step)[0] for _ in range(WINDOW)]
    assert told[:-1] == [None] * (WINDOW - 1)
    assert "all answers of every group were paid alike" in str(told[-1])


@pytest.mark.parametrize("settings", [PPOSettings(kl_stop=1.0), GRPOSettings(kl_stop=1.0)])
def test_what_goes_wrong_is_told_in_words_that_the_stage_takes(settings: Any) -> None:
    step = dict.fromkeys(("entropy", "answer_length", "reward", "empty_share", "score", "score_std", "grad_norm"), 0.5)
    health = Health(settings)
    _, first = health.verdict({**step, "eos_share": 0.2})
    why, second = health.verdict({**step, "eos_share": 0.2, "entropy": 0.01, "kl": 2.0})
    words = {word for text in [*first, *second, str(why)] for word in re.findall(r"\b[a-z]+_[a-z_]+\b|\bbeta\b", text)}
    assert words >= {"learning_rate", "kl_stop"} and words <= type(settings).model_fields.keys()
    assert len(words) == 5  # and those for the length, the weight of the KL penalty, and the penalty for cut answers


def test_the_plan_counts_the_passes_that_score_an_answer(tiny_base: Path) -> None:
    ppo: dict[str, Any] = {"batch_size": 4, "per_device_train_batch_size": 4}
    minis = {"mini_batch_size": 2, "per_device_train_batch_size": 2}
    trainers: list[Any] = [
        ppo_trainer(tiny_base, length, **ppo, critic="trunk"),
        ppo_trainer(tiny_base, length, **ppo, critic="adapter"),
        ppo_trainer(tiny_base, length, **{**ppo, **minis}, critic="adapter"),
        trainer(tiny_base, beta=0.1, per_device_train_batch_size=4),
        trainer(tiny_base, beta=0.0, per_device_train_batch_size=4),
    ]
    for one in trainers:
        rollout, read = one.rollout(0), list[int]()
        hook = one.actors.backbone.register_forward_pre_hook(lambda *_, read=read: read.append(1))
        one.score(rollout.episodes, [float(place) for place in range(len(rollout.rows))])
        hook.remove()
        packs = len(rollout.rows) // one.pack_size
        assert len(read) == packs * one.settings.scoring_passes


def replaced(base: Path) -> list[str]:
    """This process's answers once groups that are alike have made way for others."""
    grpo = trainer(base, parity, num_generations=2, max_num_gen_batches=3)
    rollout = grpo.rollout(0)
    return grpo.choose(rollout, grpo.ask_sources(rollout))[0].texts


def parity(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(said)) % 2) for said in completions]


def test_two_processes_replace_the_groups_that_one_does(tiny_base: Path, tmp_path: Path) -> None:
    ranks = on_two_processes("test_grpo", "replaced", tiny_base, tmp_path)
    first = trainer(tiny_base, parity, num_generations=2).rollout(0).texts
    assert [*ranks[0], *ranks[1]] == replaced(tiny_base) != first


def test_two_processes_learn_what_one_does(tiny_base: Path, parents: Path) -> None:  # noqa: F811
    """They share the groups and draw the same answers; what differs is the order of sums."""
    train = {
        "max_steps": 3, "generation_batch_size": 8, "num_generations": 2, "per_device_train_batch_size": 2,
        "max_completion_length": 10, "learning_rate": 1e-3, "beta": 0.1,
    }  # fmt: skip
    tree = ppo_tree(tiny_base, parents)
    stage = {**tree["stages"].pop("ppo"), "train": train}
    tree["stages"] |= {"one": {"kind": "grpo", **stage}, "two": {"kind": "grpo", **stage}}
    path = write_recipe(tree, parents / "grpo.yaml")
    for name, count in (("one", 1), ("two", 2)):
        launch_stage(count, path, name, parents / "runs")
    before, one, two = (
        load_file(parents / "runs/tiny" / name / "adapter/adapter_model.safetensors") for name in ("sft", "one", "two")
    )
    moved = sum(float((one[name] - weight).abs().sum()) for name, weight in before.items())
    apart = sum(float((one[name] - two[name]).abs().sum()) for name in before)
    assert moved > 0
    assert apart < 0.01 * moved
