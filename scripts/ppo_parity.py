"""One PPO update on a fixed batch: our gradients against those of TRL 1.12's experimental PPOTrainer.

    pip install --no-deps --target /tmp/trl112 trl==1.12.0
    python scripts/ppo_parity.py /tmp/trl112

A tiny model in float32, the same adapters, prompts, answers and scores on both sides. TRL's own train() runs; only what
it samples and what its reward model says are given, and its optimizer notes the gradients instead of stepping. Answers
have full length and no end token: after one, TRL counts a token more of padding than we do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parent), "."]

import torch
from make_tiny_base import make_tiny_base
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from pipeline.models import adapters
from pipeline.models.base import load_base
from pipeline.models.sampling import Episode
from pipeline.models.spec import ModelSpec
from pipeline.ppo import trainer as ours
from pipeline.ppo.actors import REFERENCE, VALUE, Actors
from pipeline.ppo.batch import pack_episodes
from pipeline.ppo.scoring import take_advantages
from pipeline.ppo.settings import PPOSettings

B, P, G, KL_COEF, VF_COEF = 6, 5, 9, 0.2, 0.3
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def moved(model: Any, seed: int) -> Any:
    """An adapter that is not the identity."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or ".score." in name:
                weight.copy_(torch.randn(weight.shape, generator=chance) * 0.2)
    return model


def our_gradients(base: Path, folder: Path, ids_BT: torch.Tensor, scores: list[float]) -> dict[str, torch.Tensor]:
    spec = ModelSpec(base=str(base), quantize="none", dtype="float32", lora=LORA)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = adapters.carried(load_base(spec, tokenizer), folder / "policy")
    with torch.no_grad():  # TRL's reference is the policy with its adapter switched off
        adapters.twin(model, REFERENCE)
        for name, weight in model.named_parameters():
            if f".{REFERENCE}." in name and "lora_B" in name:
                weight.zero_()
    head = adapters.borrowed(model, VALUE, folder / "value", trainable=True)
    settings = PPOSettings(
        batch_size=B, per_device_train_batch_size=B, response_length=G, num_ppo_epochs=2, kl_coef=KL_COEF,
        vf_coef=VF_COEF, normalize_reward="none", missing_eos_penalty=0.0, gradient_checkpointing=False,
        critic="adapter", max_grad_norm=1e9,
    )  # fmt: skip
    actors = Actors(model, 0, 1.0, "adapter", {})
    with torch.no_grad():
        actors.value_head.weight.copy_(head)
    trainer = ours.PPOTrainer(actors, tokenizer, [], [], settings, 17)
    episodes = [Episode(row[:P], row[P:], [0.0] * G, ended=True) for row in ids_BT.tolist()]
    (pack,) = pack_episodes(episodes, B, 0, actors.device)
    with torch.no_grad():  # what the sampler would have noted
        for episode, logp in zip(episodes, actors.policy(pack)[0].tolist(), strict=True):
            episode.logp = logp
    trainer.step = 1  # the critic stands where it was put
    (batch,), _ = take_advantages(trainer.score(episodes, scores), settings, trainer.kl.coef)
    trainer.backward(batch, float(B * G))
    policy = {name: weight.grad for name, weight in actors.trained("policy").items()}
    return {
        **{name.replace(".default.", "."): grad for name, grad in policy.items()},
        **{"value " + name.replace(f".{VALUE}.", "."): w.grad for name, w in actors.trained("value").items()},
    }


def their_gradients(base: Path, folder: Path, ids_BT: torch.Tensor, scores: list[float]) -> dict[str, torch.Tensor]:
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token_id = 0
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "policy", is_trainable=True
    )
    critic = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    value = PeftModel.from_pretrained(critic, folder / "value", is_trainable=True).base_model.model
    reward = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)

    def sampled(model: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return ids_BT, model(input_ids=ids_BT).logits[:, P - 1 : -1]

    read = ppo_trainer.get_reward

    def scored(model: Any, *rest: Any) -> Any:
        return (None, torch.tensor(scores), None) if model is reward else read(model, *rest)

    ppo_trainer.batch_generation, ppo_trainer.get_reward = sampled, scored
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=B, gradient_accumulation_steps=1, num_ppo_epochs=1,
        response_length=G, total_episodes=B, temperature=1.0, kl_coef=KL_COEF, vf_coef=VF_COEF, bf16=False,
        use_cpu=True, num_sample_generations=0, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": ids_BT[0, :P].tolist()}] * B)
    trainer = PPOTrainer(
        args=args, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    found: dict[str, torch.Tensor] = {}

    def note(*_: Any, **__: Any) -> None:
        for name, weight in policy.named_parameters():
            if weight.grad is not None:
                found[name.replace(".default.", ".")] = weight.grad.clone()
        for name, weight in value.named_parameters():
            if weight.grad is not None and ("lora_" in name or "score.modules_to_save" in name):
                plain = name.replace(".default.", ".")
                head = "score.modules_to_save" in name
                found["value " + ("value_head.weight" if head else f"base_model.model.{plain}")] = weight.grad.clone()

    trainer.optimizer.step = note
    trainer.train()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = make_tiny_base(folder / "base")
        spec = ModelSpec(base=str(base), quantize="none", dtype="float32", lora=LORA)
        tokenizer = AutoTokenizer.from_pretrained(base)
        torch.manual_seed(0)
        adapters.save(moved(adapters.fresh(load_base(spec, tokenizer), LORA), 1), folder / "policy")
        adapters.save(
            moved(adapters.fresh(load_base(spec, tokenizer, num_labels=1), LORA, head=True), 2), folder / "value"
        )
        chance = torch.Generator().manual_seed(3)
        ids_BT = torch.randint(20, 500, (B, P + G), generator=chance)
        scores = torch.randn(B, generator=chance).tolist()
        mine = our_gradients(base, folder, ids_BT, scores)
        theirs = their_gradients(base, folder, ids_BT, scores)
    worst = 0.0
    for part in ("", "value "):
        names = [name for name in mine if name.startswith("value ") == bool(part) and name in theirs]
        error = max(
            ((mine[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)).item() for name in names
        )
        size = sum(theirs[name].square().sum().item() for name in names) ** 0.5
        role = part.strip() or "policy"
        print(f"{role}: {len(names)} tensors, gradient norm {size:.4g}, worst relative difference {error:.2g}")
        worst = max(worst, error)
    unmatched = sorted(mine.keys() ^ theirs.keys())
    print(f"in one side only: {unmatched}")
    sys.exit(0 if worst < 1e-3 else 1)


if __name__ == "__main__":
    main()
