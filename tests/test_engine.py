"""Rollouts by vLLM: the correction is TRL's, whatever the engine does wrong is named and nothing is lost by it, and
where vLLM is installed, the real one answers as the model that is trained.

The last part needs an environment made by scripts/make_vllm_env.sh, at its place or named in ONEBASE_VLLM_PYTHON.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, head
from test_grpo import collect, length, trainer
from test_ppo import trainer as ppo_trainer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import GRPOTrainer as TRLsGRPOTrainer

from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError
from pipeline.models.spec import ModelSpec
from pipeline.ppo import algorithm as maths
from pipeline.ppo import engine as engines
from pipeline.ppo import groups, importance
from pipeline.ppo.engine import Engine, EngineError
from pipeline.ppo.engine_settings import PLACE, PYTHON, EngineSettings
from pipeline.ppo.grpo_settings import GRPOSettings
from pipeline.recipe.recipe import Recipe, build
from pipeline.runs.stage import run_stage
from pipeline.stages.check import check_engines

VLLM = os.environ.get(PYTHON) or (str(ROOT / PLACE) if (ROOT / PLACE).exists() else None)
FAKE = Path(__file__).with_name("fake_engine.py")
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put the fake in the engine's place, and say what it does wrong and from which answer on."""
    monkeypatch.setattr(engines, "PROGRAM", FAKE)
    monkeypatch.setattr(engines, "find_python", lambda *_: sys.executable)

    def does(how: str, start: int = 1) -> None:
        monkeypatch.setenv("FAKE_HOW", how)
        monkeypatch.setenv("FAKE_FROM", str(start))

    does("")
    return does


def start(ours: Any, base: Path, folder: Path, **settings: Any) -> Engine:
    spec = ModelSpec(base=str(base), dtype="float32", quantize="nf4")
    said, out = EngineSettings(engine="vllm", **settings), Artifact(folder / "grpo")
    return Engine(said, spec, ours.actors.model, str(folder), out, longest=120, at_once=8)


@pytest.mark.parametrize("mode", MODES)
def test_the_correction_is_trls(mode: Any) -> None:
    """The ratios by TRL's own lines, and the loss and its gradient by its own function."""
    draw = torch.Generator().manual_seed(2)
    mask = torch.tensor([[float(place < count) for place in range(6)] for count in (6, 1, 4, 5)])
    old = -torch.rand(mask.shape, generator=draw) * 2
    theirs_logp = old + torch.randn(mask.shape, generator=draw) * 0.4
    settings = GRPOSettings(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=0.4, vllm_importance_sampling_clip_max=1.5
    )
    source = inspect.getsource(TRLsGRPOTrainer._generate_and_score_completions)
    block = source[source.index("                mask = completion_mask if tool_mask") :]
    block = block[: block.index("            # Compute the per-token log probabilities for the reference model")]
    trl: Any = SimpleNamespace(**{name: getattr(settings, name) for name in GRPOSettings.model_fields})
    scope: dict[str, Any] = {
        "self": trl, "completion_mask": mask, "tool_mask": None, "old_per_token_logps": old,
        "sampling_per_token_logps": theirs_logp, "torch": torch, "math": __import__("math"),
    }  # fmt: skip
    exec(textwrap.dedent(block), scope)
    expected = scope["vllm_importance_sampling_ratio"]
    found = importance.ratios(old, theirs_logp, mask, settings)
    assert torch.allclose(found * mask, expected * mask)
    assert len((found * mask).unique()) > 2, "bounds leave nothing to compare"

    ours = (old + torch.randn(mask.shape, generator=draw) * 0.3).requires_grad_()
    trls = ours.detach().clone().requires_grad_()
    gains = torch.tensor([1.0, -0.5, 0.3, -2.0])
    weights = groups.weights(mask, "dapo", 4, float(mask.sum()), 6)
    loss, _ = groups.policy_loss(ours, old, gains, weights, level="token", clip=(0.2, 0.2), importance_BG=found)
    weighted = maths.policy_loss(ours, old, gains[:, None].expand_as(mask), weights, 0.2, found)[0]
    assert weighted.item() == pytest.approx(loss.item()), "ppo's loss is grpo's with an advantage for each token"
    inputs = {
        "prompt_ids": torch.zeros(4, 1), "prompt_mask": torch.ones(4, 1), "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask, "advantages": gains, "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
        "importance_sampling_ratio": expected,
    }  # fmt: skip
    plain = SimpleNamespace(gather=lambda tensor: tensor, num_processes=1, reduce=lambda tensor, reduction: tensor)
    whole: Any = SimpleNamespace(
        loss_type="dapo", importance_sampling_level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.2,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, use_vllm=True,
        vllm_importance_sampling_correction=True, _entropy_bonus_enabled=False, accelerator=plain,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=6,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (trls, torch.ones_like(mask), None),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    TRLsGRPOTrainer._compute_loss(whole, None, inputs).backward()
    loss.backward()
    assert torch.allclose(ours.grad, trls.grad * mask, atol=1e-6)  # type: ignore[arg-type,operator]


def test_episodes_are_the_engines_and_their_figures_the_models_own(tiny_base: Path, tmp_path: Path, fake: Any) -> None:
    """Also a critic's values. The reference: plain forward passes over each answer alone."""
    ours = ppo_trainer(tiny_base, length, batch_size=4, critic="trunk", temperature=0.7, rollout_batch_size=2)
    torch.nn.init.normal_(ours.actors.value_head.weight)
    ours.engine = start(ours, tiny_base, tmp_path, max_logp_difference=100)
    rollout = ours.rollout(0)
    ours.engine.close()
    model = ours.actors.model
    for episode in rollout.episodes:
        ids = torch.tensor([episode.prompt_ids + episode.answer_ids])
        with torch.no_grad():
            states = model.get_base_model().model(input_ids=ids).last_hidden_state[0, len(episode.prompt_ids) - 1 : -1]
            logp = torch.log_softmax(model.get_base_model().lm_head(states).float() / 0.7, -1)
            values = states @ ours.actors.value_head.weight[0]
        expected = logp.gather(1, torch.tensor(episode.answer_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(episode.logp), expected, atol=1e-4)
        assert torch.allclose(torch.tensor(episode.values), values, atol=1e-4)
        assert len(episode.answer_ids) == 8 and all(-7 <= one <= -6 for one in episode.sampling_logp)
        assert not episode.ended


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("dies", r"has ended by itself \(status -9\).*out of luck"),
        ("fails", "failed: ValueError: no such adapter"),
        ("garbles", "no JSON"),
        ("cuts", "gave 7 tokens with 7 log-probabilities, which is no whole answer"),
        ("lacks", "gave 7 answers to 8 requests"),
        ("", r"was stopped at step 1: vLLM's log-probabilities are .* nats a token from the model's own"),
    ],
)
def test_what_an_engine_does_wrong_is_named(tiny_base: Path, tmp_path: Path, fake: Any, how: str, said: str) -> None:
    grpo = trainer(tiny_base)
    fake(how)
    grpo.engine = start(grpo, tiny_base, tmp_path)
    with pytest.raises(EngineError) as raised:
        grpo.rollout(0)
    assert re.search(said, str(raised.value), re.DOTALL), raised.value
    grpo.engine.close()
    assert not (tmp_path / "grpo" / "engine").exists()


def test_a_stage_whose_engine_died_goes_on_from_the_step_it_died_in(tiny_base: Path, tmp_path: Path, fake: Any) -> None:
    (tmp_path / "pay.py").write_text(
        "def pay(completions, **others): return [float(len(c[-1]['content'])) for c in completions]"
    )
    data = {"path": head("prompts.jsonl", 12, tmp_path / "p.jsonl")}
    train = {
        "max_steps": 3, "num_generations": 4, "generation_batch_size": 8, "max_completion_length": 6, "save_steps": 0,
        "learning_rate": 1e-3, "gradient_checkpointing": False, "vllm_importance_sampling_mode": "token_truncate",
    }  # fmt: skip
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    section = {
        "reward": f"{tmp_path}/pay.py:pay", "data": data, "train": train,
        "rollout": {"engine": "vllm", "max_logp_difference": 100},
    }  # fmt: skip
    tree = {
        "name": "engine", "model": {"base": str(tiny_base), "dtype": "float32", "lora": lora},
        "stages": {"grpo": section},
    }  # fmt: skip
    recipe: Recipe = build(tree)
    run_stage(recipe, "grpo", tmp_path / "whole")
    fake("dies", 3)
    with pytest.raises(EngineError):
        run_stage(recipe, "grpo", tmp_path / "died")
    out = recipe.artifact("grpo", tmp_path / "died")
    assert [folder.name for folder in out.checkpoints.iterdir()] == ["checkpoint-2"]
    fake("")
    run_stage(recipe, "grpo", tmp_path / "died")
    whole, died = (recipe.artifact("grpo", tmp_path / runs) for runs in ("whole", "died"))
    assert (whole.adapter / "adapter_model.safetensors").read_bytes() == (
        died.adapter / "adapter_model.safetensors"
    ).read_bytes()
    steps = [line for line in map(json.loads, died.metrics.read_text().splitlines()) if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["sampling/sampling_logp_difference/max"] >= line["sampling/sampling_logp_difference/mean"] > 0
        assert 0 < line["sampling/importance_sampling_ratio/min"] <= line["sampling/importance_sampling_ratio/max"] <= 3
    assert died.finished().invariants["engine"] == "vLLM 0.0 on cpu"


def test_the_engine_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """Killed with no chance to tidy up."""
    starter = (
        "import subprocess, sys, time\n"
        f"command = [sys.executable, {str(engines.PROGRAM)!r}]\n"
        "p = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(0.5)
    os.kill(pid, 0)  # it runs
    parent.kill()
    parent.wait()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the engine outlived its stage by 5 seconds")


def test_what_cannot_be_is_refused_before_anything_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    data, pay = {"path": head("prompts.jsonl", 4, tmp_path / "p.jsonl")}, "recipes/rewards/fact.py:right"

    def read(lora: dict[str, Any] | None = None, **section: Any) -> Recipe:
        model = {"base": str(tiny_base), "lora": lora or {"r": 4}}
        return build({"name": "x", "model": model, "stages": {"ppo": {"reward": pay, "data": data, **section}}})

    vllm = {"engine": "vllm"}
    for said, section in [
        ("stages.ppo.rollout.engine: input should be 'vllm' (found 'sglang')", {"rollout": {"engine": "sglang"}}),
        ("stages.ppo.rollout.top_p: unknown key", {"rollout": {**vllm, "top_p": 0.9}}),
        ("stages.ppo.train.top_k: unknown key", {"rollout": vllm, "train": {"top_k": 40}}),
        ("vllm_importance_sampling_mode: is for an engine", {"train": {"vllm_importance_sampling_mode": "token_mask"}}),
        ("together with dequantize_rollout", {"rollout": vllm, "train": {"dequantize_rollout": True}}),
        ("together with environment", {"rollout": vllm, "environment": "recipes/environments/search.py:Search"}),
    ]:
        with pytest.raises(UserError, match=re.escape(said)):
            read(**section)
    with pytest.raises(UserError, match=r"stages.ppo.rollout: there is no Python at /nowhere/python"):
        check_engines(*_models(read(rollout={**vllm, "python": "/nowhere/python"})))
    with pytest.raises(UserError, match=r"stages.ppo.rollout: vLLM is not installed for"):
        check_engines(*_models(read(rollout={**vllm, "python": sys.executable})))
    assert "rollout" not in read().parts()["ppo"]["stage"], "a stage without an engine is what it was"
    python = read(rollout={**vllm, "python": "/a"}).parts(), read(rollout={**vllm, "python": "/b"}).parts()
    assert python[0] == python[1] != read().parts()


def _models(recipe: Recipe) -> Any:
    return recipe.spec.model, recipe.stages


def test_the_base_for_the_engine_is_the_one_in_memory(tiny_base: Path, tmp_path: Path) -> None:
    """To transformers, which knows nothing of where it comes from."""
    grpo = trainer(tiny_base)
    folder = engines.written_base(grpo.actors.model, ModelSpec(base=str(tiny_base), dtype="float32"), "a")
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and plain.dtype is torch.float32
    ids = torch.arange(40)[None]
    with grpo.actors.model.disable_adapter(), torch.no_grad():
        expected = grpo.actors.model(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids).logits, expected, atol=1e-5)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert engines.written_base(grpo.actors.model, ModelSpec(base=str(tiny_base), dtype="float32"), "a") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    engines.written_base(grpo.actors.model, ModelSpec(base=str(tiny_base), dtype="float32"), "a")
    assert AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def wide_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with heads of a width that vLLM's attention on a CPU has."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    shutil.copytree(tiny_base, folder)
    config = LlamaConfig.from_pretrained(folder, head_dim=32)
    torch.manual_seed(1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.skipif(
    VLLM is None, reason="vLLM is not installed: scripts/make_vllm_env.sh, or name its Python in $" + PYTHON
)
def test_vllm_answers_as_the_model_that_is_trained(
    wide_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 at each step of a training that moves fast, by two passes of different programs; the same answers for
    the same seeds; and an adapter of the step before is found out."""
    monkeypatch.setenv(PYTHON, str(VLLM))
    grpo = trainer(wide_base, learning_rate=3e-2, max_steps=3, temperature=0.8)
    grpo.engine = start(grpo, wide_base, tmp_path)
    process = grpo.engine.process
    seen = list(grpo.steps())
    assert [step["sampling/sampling_logp_difference/max"] < 1e-4 for step in seen] == 3 * [True], seen
    again = [[episode.answer_ids for episode in grpo.rollout(9).episodes] for _ in range(2)]
    assert again[0] == again[1] and len({tuple(ids) for ids in again[0]}) > 4
    grpo.engine.step = grpo.step = 2  # as if it had been told of no adapter since
    grpo.update(collect(grpo)[1])
    with pytest.raises(EngineError, match="another adapter than what is trained"):
        grpo.rollout(9)
    grpo.engine.close()
    assert process.returncode == -signal.SIGKILL
