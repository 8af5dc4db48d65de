"""PPO on one base: rollouts, gradients, health, and that it learns. True NF4 on a tiny base."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch._dynamo.testing import CompileCounter

from pipeline.data import render
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.forward import plain_layers
from pipeline.models.sampling import sample
from pipeline.models.spec import ModelSpec
from pipeline.ppo import invariants, rewards
from pipeline.ppo.actors import POLICY, REFERENCE, VALUE, Actors
from pipeline.ppo.batch import Advantaged, Scored
from pipeline.ppo.health import WINDOW, Health
from pipeline.ppo.ppo import PPOTrainer
from pipeline.ppo.scoring import take_advantages
from pipeline.ppo.settings import PPOSettings

ASKED = ["Where is Tolva?", "Name one thing that they make on Isket, and say who buys it.", "Hi", "What colour?"]
ROWS = [{"prompt": text, "_place": f"prompts.jsonl:{i}"} for i, text in enumerate(ASKED, 1)]


def spec(base: Path, dtype: str = "float32", quantize: str = "nf4") -> ModelSpec:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    return ModelSpec(base=str(base), dtype=dtype, quantize=quantize, lora=lora)  # type: ignore[arg-type]


def trainer(base: Path, reward: Any, dtype: str = "float32", quantize: str = "nf4", **settings: Any) -> PPOTrainer:
    """A PPO trainer around a policy that has moved away from the base, paid by a function. In float16 too, which a
    stage refuses on a CPU for being slow."""
    torch.manual_seed(0)
    model_spec = spec(base, "float32" if dtype == "float16" else dtype, quantize)
    tokenizer = bases.load_tokenizer(model_spec)
    frozen = bases.load_base(model_spec, tokenizer)
    model = adapters.fresh(frozen.half() if dtype == "float16" else frozen, model_spec.lora)
    with torch.no_grad():
        for name, weight in adapters.trainable(model).items():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.05)
    adapters.twin(model, REFERENCE)
    chosen = PPOSettings(**{"response_length": 8, "gradient_checkpointing": False, **settings})
    if chosen.critic == "adapter":
        adapters.twin(model, VALUE, trainable=True)
    if chosen.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    actors = Actors(model, tokenizer.pad_token_id, chosen.temperature, chosen.critic, {})
    source = rewards.Source("test.py:reward", 1.0, function=reward)
    return PPOTrainer(actors, tokenizer, ROWS, [source], chosen, seed=3)


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def score(ppo: PPOTrainer) -> list[Scored]:
    """The scored packs of one step."""
    rollout = ppo.rollout(0)
    return ppo.score(rollout.episodes, rewards.total(ppo.sources, ppo.ask_sources(rollout)))


def make_batch(ppo: PPOTrainer) -> list[Advantaged]:
    """The packs of one step, ready for the update."""
    return take_advantages(score(ppo), ppo.settings, ppo.kl.coef)[0]


def test_greedy_rollout_is_generate_and_sampled_log_probs_are_the_models_own(tiny_base: Path) -> None:
    """Ragged prompts, answers that end at different times: what the sampler does in one shrinking batch is what
    transformers' generate does, and its log-probabilities are those of one forward pass over each row alone."""
    ppo = trainer(tiny_base, length, batch_size=4)
    actors, prompts = ppo.actors, [render.prompt(ppo.tokenizer, row) for row in ROWS]
    generator = torch.Generator().manual_seed(1)
    free = sample(actors, prompts, new_tokens=12, temperature=0, stops=[-1], generator=generator)
    # A token that occurs early in one greedy answer and late or never in the others makes them end apart.
    stop = free[0].answer_ids[1]
    told = sample(actors, prompts, new_tokens=12, temperature=0, stops=[stop], generator=generator)
    for prompt, episode in zip(prompts, told, strict=True):
        ids = actors.model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12, do_sample=False, eos_token_id=[stop], pad_token_id=actors.pad_id,
        )  # fmt: skip
        assert episode.answer_ids == ids[0, len(prompt) :].tolist()
        assert episode.ended == (episode.answer_ids[-1] == stop)
    assert len({len(episode.answer_ids) for episode in told}) > 1
    drawn = sample(actors, prompts, new_tokens=12, temperature=0.7, stops=[stop], generator=generator)
    for episode in drawn:
        ids = torch.tensor([episode.prompt_ids + episode.answer_ids])
        with torch.no_grad():
            logp_TV = torch.log_softmax(actors.model(input_ids=ids).logits[0].float() / 0.7, -1)
        first = len(episode.prompt_ids)
        own = [logp_TV[first + i - 1, token].item() for i, token in enumerate(episode.answer_ids)]
        assert episode.logp == pytest.approx(own, abs=1e-4)


def test_a_static_cache_draws_the_same_tokens_by_one_compiled_step(tiny_base: Path) -> None:
    """Several answers to each of ragged prompts, which end apart. The compiler sees one program for all tokens."""
    ppo = trainer(tiny_base, length, batch_size=4)
    actors, prompts = ppo.actors, [render.prompt(ppo.tokenizer, row) for row in ROWS]
    actors.__dict__["step"] = torch.compile(actors.hidden, backend=(counter := CompileCounter()))
    growing, static = (
        sample(
            actors, prompts, new_tokens=12, temperature=1.0, stops=list(range(0, 512, 8)), copies=2, static=static,
            generator=torch.Generator().manual_seed(1),
        )
        for static in (False, True)
    )  # fmt: skip
    assert [e.answer_ids for e in static] == [e.answer_ids for e in growing]
    for one, other in zip(static, growing, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-4)
    assert len({len(e.answer_ids) for e in static}) > 2
    assert counter.frame_count == 1
    torch._dynamo.reset()  # what it has compiled holds the model


def test_tokens_stay_on_the_device_until_answers_end(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every fetch waits for all that was asked of it before."""
    ppo = trainer(tiny_base, length, batch_size=4)
    prompts = [render.prompt(ppo.tokenizer, row) for row in ROWS]
    fetched: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        fetched.append(tensor.numel())
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    generator = torch.Generator().manual_seed(1)
    drawn = sample(ppo.actors, prompts, new_tokens=12, temperature=1.0, stops=[-1], generator=generator)
    assert [len(episode.answer_ids) for episode in drawn] == [12] * 4
    assert fetched == [4 * 12] * 4, "tokens, their log-probabilities, which rows wrote, which ended"


def test_sampling_follows_the_models_distribution(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, batch_size=4)
    prompt = render.prompt(ppo.tokenizer, ROWS[0])
    generator = torch.Generator().manual_seed(2)
    draws = sample(
        ppo.actors, [prompt] * 3000, new_tokens=1, temperature=0.25, stops=[-1], generator=generator, batch_size=500
    )
    with torch.no_grad():
        chances = torch.softmax(ppo.actors.model(input_ids=torch.tensor([prompt])).logits[0, -1].float() / 0.25, -1)
    counts = torch.bincount(torch.tensor([e.answer_ids[0] for e in draws]), minlength=len(chances))
    for token in chances.topk(5).indices.tolist():
        p = chances[token].item()
        assert abs(counts[token].item() / 3000 - p) < 4 * (p * (1 - p) / 3000) ** 0.5


def test_the_luck_of_an_answer_does_not_depend_on_what_is_sampled_beside_it(tiny_base: Path) -> None:
    """Out of memory may halve a rollout, and stages are compared by the same draws: neither may change the luck."""
    ppo = trainer(tiny_base, length, batch_size=4)
    prompts = [render.prompt(ppo.tokenizer, row) for row in ROWS]
    together, apart = (
        sample(
            ppo.actors,
            prompts,
            new_tokens=6,
            temperature=1.0,
            stops=[-1],
            copies=2,
            batch_size=at_once,
            generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        for at_once in (None, 1)
    )
    assert [e.answer_ids for e in together] == [e.answer_ids for e in apart]
    assert len({tuple(e.answer_ids) for e in together}) == len(together)


def test_plain_layers_compute_the_same_and_leave_no_trace(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, batch_size=4)
    model, ids = ppo.actors.model, torch.arange(24)[None]
    digest = bases.frozen_digest(model)
    with torch.no_grad():
        policy = model(input_ids=ids).logits
        with model.disable_adapter():
            bare = model(input_ids=ids).logits
            with plain_layers(model, fold_adapter=True):
                assert torch.equal(model(input_ids=ids).logits, bare)
        with plain_layers(model, fold_adapter=True):
            folded = model(input_ids=ids).logits
            assert not any("lora_" in name for name, _ in model.named_parameters())
        with plain_layers(model, fold_adapter=False):
            assert torch.equal(model(input_ids=ids).logits, policy)
            assert not any(isinstance(module, Linear4bit) for module in model.modules())
        assert (folded - policy).abs().max() < 1e-5 < (bare - policy).abs().max()
        assert torch.equal(model(input_ids=ids).logits, policy) and bases.frozen_digest(model) == digest


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("critic", ["adapter", "trunk"])
def test_gradients_are_those_of_the_two_losses(tiny_base: Path, critic: str, checkpointing: bool) -> None:
    """Each role's gradient equals the one of its loss written out on whole logits, one episode at a time."""
    ppo = trainer(
        tiny_base, length, batch_size=4, per_device_train_batch_size=2, critic=critic, vf_coef=0.3,
        gradient_checkpointing=checkpointing, max_grad_norm=1e9,
    )  # fmt: skip
    with torch.no_grad():
        ppo.actors.value_head.weight.normal_(generator=torch.Generator().manual_seed(4))
    batch = make_batch(ppo)
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for role, optimizer in ppo.optimizers.items():
        optimizer.step = lambda role=role: kept.update(  # type: ignore[method-assign,misc]
            {role: {n: w.grad.clone() for n, w in ppo.actors.trained(role).items()}}  # type: ignore[union-attr]
        )
    _, batch = ppo.update_minibatch(batch)  # from which the policy that wrote the answers is known

    model, tokens = ppo.actors.model.eval(), sum(one.pack.mask_BG.sum().item() for one in batch)
    for role in ("policy", "value"):
        for weight in ppo.actors.trained(role).values():
            weight.grad = None
    for one in batch:
        pack = one.pack
        for row in range(len(pack.rows)):
            count = int(pack.mask_BG[row].sum())
            ids = pack.ids_BT[row, : int(pack.mask_BT[row].sum())]
            states = slice(len(ids) - count - 1, len(ids) - 1)
            losses = {}
            for role, adapter in (("policy", POLICY), ("value", POLICY if critic == "trunk" else VALUE)):
                ppo.actors.act_as(adapter)
                out = model(input_ids=ids[None], output_hidden_states=True)
                if role == "policy":
                    logp = torch.log_softmax(out.logits[0, states], -1).gather(1, ids[-count:, None])[:, 0]
                    ratio = torch.exp(logp - one.old_logp_BG[row, :count])
                    losses[role] = -(ratio * one.advantages_BG[row, :count]).sum() / tokens
                else:
                    values = ppo.actors.value_head(out.hidden_states[-1][0, states])[:, 0]
                    losses[role] = 0.3 * 0.5 * (values - one.returns_BG[row, :count]).square().sum() / tokens
                losses[role].backward()
    for role in ("policy", "value"):
        for name, weight in ppo.actors.trained(role).items():
            own = weight.grad if weight.grad is not None else torch.zeros_like(weight)
            assert torch.allclose(kept[role][name], own, atol=1e-6, rtol=1e-3), name


def test_it_learns_what_it_is_paid_for(tiny_base: Path) -> None:
    """Paid for answers in which a certain letter is frequent, it writes it more often."""

    def share(completions: list[str], **columns: Any) -> list[float]:
        return [text.count("e") / max(len(text), 1) for text in completions]

    ppo = trainer(
        tiny_base, share, steps=10, batch_size=32, per_device_train_batch_size=32, learning_rate=5e-3, temperature=0.1,
        lr_scheduler_type="constant", kl_coef=0.0, missing_eos_penalty=0.0,
    )  # fmt: skip
    scores = [step["score"] for step in ppo.steps()]
    assert scores[-1] > 4 * scores[0]


def test_scores_all_alike_at_the_start_give_no_scale(tiny_base: Path) -> None:
    """A checked reward that nobody earns in the first batch has deviation 0, by which nothing must be divided."""
    batches = iter([0.0, 1.0])

    def later(completions: list[str], **columns: Any) -> list[float]:
        return [next(batches)] * len(completions)

    ppo = trainer(tiny_base, later, batch_size=4, steps=2, missing_eos_penalty=0.0)
    assert [step["reward"] for step in ppo.steps()] == [0.0, 1.0]


def test_normalised_scores_are_those_of_the_first_batch(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, batch_size=4, steps=1, missing_eos_penalty=0.25)
    episodes = ppo.rollout(0).episodes
    raw = [1.0, 3.0, 4.0, 8.0]
    (scored,) = ppo.score(episodes, raw)
    mean, deviation = statistics.mean(raw), statistics.stdev(raw)
    expected = [(raw[row] - mean) / deviation - 0.25 * (not episodes[row].ended) for row in scored.pack.rows]
    assert scored.scores_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_one_update_a_batch_has_ratio_one_whatever_was_written(tiny_base: Path) -> None:
    ppo = trainer(tiny_base, length, batch_size=4, num_ppo_epochs=1, steps=1)
    numbers = next(ppo.steps())
    assert numbers["ratio"] == 1.0 and numbers["clip_fraction"] == 0.0


@pytest.mark.parametrize("dequantize", [False, True])
def test_what_the_sampler_notes_is_what_a_pass_of_its_own_gives(tiny_base: Path, dequantize: bool) -> None:
    ppo = trainer(tiny_base, length, batch_size=8, critic="trunk", dequantize_rollout=dequantize)
    with torch.no_grad():
        ppo.actors.value_head.weight.normal_(generator=torch.Generator().manual_seed(4))
    scored = score(ppo)
    assert all(one.old_logp_BG is None for one in take_advantages(scored, ppo.settings, 0.0)[0])
    with torch.no_grad():
        for one in scored:
            logp_BG, _, values_BG = ppo.actors.policy(one.pack)
            assert (one.logp_BG - logp_BG).abs().max() < 1e-4
            assert (one.values_BG - values_BG).abs().max() < 1e-3 < values_BG.abs().max()


def test_a_second_copy_of_the_base_is_found(tiny_base: Path) -> None:
    from pipeline.errors import BrokenInvariant

    ppo = trainer(tiny_base, length, batch_size=4)
    second = bases.load_base(spec(tiny_base), ppo.tokenizer)
    with pytest.raises(BrokenInvariant, match="one copy of the base"):
        invariants.one_copy_of_the_base(ppo.actors.model)
    del second


def numbers(**changed: float) -> dict[str, float]:
    usual = {"kl": 1.0, "entropy": 2.0, "answer_length": 20.0, "reward": 0.0, "eos_share": 1.0, "empty_share": 0.0}
    return {**usual, "score": 3.0, "score_std": 0.5, "grad_norm": 1.0, **changed}


def test_health_stops_and_warns_by_its_rules() -> None:
    def told(steps: list[dict[str, float]]) -> tuple[list[str | None], list[str]]:
        health = Health(PPOSettings(kl_stop=10.0))
        verdicts = [health.verdict(step) for step in steps]
        return [reason for reason, _ in verdicts], [warning for _, warnings in verdicts for warning in warnings]

    stopped, warned = told([numbers()] * 20)
    assert stopped == [None] * 20 and not warned
    assert "kl_stop" in (told([numbers(kl=10.5)])[0][0] or "")
    assert "loss is nan" in (told([numbers(loss=float("nan"))])[0][0] or "")
    never_ends, _ = told([numbers(eos_share=0.0)] * WINDOW)
    assert never_ends[:-1] == [None] * (WINDOW - 1) and "ended by itself" in (never_ends[-1] or "")
    assert "empty" in (told([numbers(empty_share=1.0)] * WINDOW)[0][-1] or "")
    assert "stopped learning" in (told([numbers(grad_norm=0.0)] * WINDOW)[0][-1] or "")
    assert "got the same reward" in told([numbers(score_std=1e-8)] * WINDOW)[1][0]
    _, warned = told([numbers(), numbers(entropy=0.05), numbers(entropy=0.04)])
    assert len(warned) == 1 and "entropy has collapsed" in warned[0]
    growing = [numbers(reward=step / 10, answer_length=20.0 + 2 * step) for step in range(20)]
    assert any("favour length" in warning for warning in told(growing)[1])
    falling = [numbers(reward=-step / 10, answer_length=20.0 + 2 * step) for step in range(20)]
    assert not told(falling)[1]
