"""Peak memory of one PPO step at the true shapes of an 8B model, without its weights.

    python scripts/ppo_memory.py [--prompt 256] [--answer 256] [--batch 16] [--micro 2] [--critic adapter|trunk]
    python scripts/ppo_memory.py --cuda      the same with random weights on a GPU, max_memory_allocated beside it

Llama-3-8B (hidden 4096, 32 layers, vocabulary 128256) is built from its config. Without --cuda every tensor is fake: it
has shape and type but no data, and its bytes are counted from creation to release by live_bytes.py. The 4-bit layers
are stood in as fake_base.py says. The parts of the step are those
of pipeline/ppo: sampling with the cache, scoring under each adapter, forward and backward of policy and critic, the
optimizers. Not in the figure: the CUDA context and the allocator's fragmentation (0.45 to 0.9 GiB).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), "."]

from fake_base import as_on_cuda, fake_base
from live_bytes import LiveBytes
from make_tiny_base import make_tiny_base
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from pipeline.models import adapters
from pipeline.models.base import computing
from pipeline.models.sampling import Episode
from pipeline.ppo import algorithm as maths
from pipeline.ppo.actors import POLICY, REFERENCE, VALUE, Actors
from pipeline.ppo.batch import Advantaged, pack_episodes
from pipeline.ppo.optimizer import trained_weights
from pipeline.ppo.ppo import PPOTrainer
from pipeline.ppo.scoring import score
from pipeline.ppo.settings import PPOSettings

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
DECODED_SINGLY = 2
GIB = 2**30


def base(config: LlamaConfig, cuda: bool) -> Any:
    return _random_4bit(config) if cuda else fake_base(config)


def _random_4bit(config: LlamaConfig) -> Any:
    """Random weights, quantised layer by layer so that the whole never lies in memory unquantised."""
    import bitsandbytes as bnb

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            parent = model.get_submodule(name.rpartition(".")[0])
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16) * 0.02
            layer.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            ).cuda()
            setattr(parent, name.rpartition(".")[2], layer)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                data = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16) * 0.02
                module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to("cuda")
    torch.set_default_dtype(torch.float32)
    return model


def step(trainer: PPOTrainer, given: argparse.Namespace, seen: Any) -> None:
    """One PPO step as trainer.py makes it, with answers of full length."""
    actors, device = trainer.actors, trainer.actors.device
    # sampling: the prompts at once, most answer tokens in blocks (the cache they leave is the same), the last singly
    actors.act_as(POLICY)
    actors.model.eval()
    with torch.no_grad():
        cache = DynamicCache(config=actors.config)
        blocks = [given.prompt, *[32] * ((given.answer - DECODED_SINGLY) // 32)]
        blocks += [1] * (given.prompt + given.answer - sum(blocks))
        length = 0
        for block in blocks:
            length += block
            ids_BT = torch.zeros(given.batch, block, dtype=torch.long, device=device)
            mask_BT = torch.ones(given.batch, length, dtype=torch.long, device=device)
            positions_BT = torch.arange(length - block, length, device=device).expand(given.batch, -1)
            with computing(actors.model):
                hidden_BTH = actors.hidden(ids_BT, mask_BT, positions_BT, cache)
                logits_BV = actors.logits(hidden_BTH[:, -1])
            torch.log_softmax(logits_BV.float(), -1).exp()
        del cache, hidden_BTH, logits_BV
    seen("sampling")
    episodes = [Episode([0] * given.prompt, [0] * given.answer, [0.0] * given.answer, True)] * given.batch
    # scoring: reward model, reference, policy, critic
    with torch.no_grad():
        for pack in pack_episodes(episodes, trainer.pack_size, 0, device):
            actors.act_as("reward-reward")
            with computing(actors.model):
                actors.hidden(pack.ids_BT, pack.mask_BT)
            del pack
    scored = score(actors, episodes, torch.zeros(given.batch), trainer.pack_size, trainer.settings)
    seen("scoring")
    batch = []
    for one in scored:
        rewards_BG = maths.shaped_rewards(one.scores_B, one.logp_BG, one.pack.mask_BG, 0.05)
        gained = maths.gae(rewards_BG, one.values_BG, one.pack.mask_BG, 1.0, 0.95)
        batch.append(Advantaged(one.pack, one.logp_BG, one.values_BG, *gained))
    # one update
    weights = trained_weights(trainer.optimizers)
    trainer.run_backward(batch, float(given.batch * given.answer))
    seen("forward and backward")
    for weight in weights:  # an adapter that no pass has reached has them too, when the optimizers take their step
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    seen("missing gradients")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("prompt", 256), ("answer", 256), ("batch", 16), ("micro", 2), ("layers", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--critic", choices=["adapter", "trunk"], default="adapter")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--cuda", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(make_tiny_base(Path(scratch) / "tiny"))
    config = LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": given.layers})  # type: ignore[arg-type]
    live = LiveBytes()
    with contextlib.ExitStack() as held:
        if not given.cuda:
            held.enter_context(as_on_cuda())
        held.enter_context(live)
        model = get_peft_model(base(config, given.cuda), LoraConfig(**LORA, task_type="CAUSAL_LM"))  # type: ignore[arg-type]
        adapters.twin(model, REFERENCE)
        adapters.twin(model, "reward-reward")
        if given.critic == "adapter":
            adapters.twin(model, VALUE, trainable=True)
        settings = PPOSettings(
            batch_size=given.batch, per_device_train_batch_size=given.micro, response_length=given.answer,
            num_ppo_epochs=2, critic=given.critic, gradient_checkpointing=not given.no_checkpointing,
        )  # fmt: skip
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        actors = Actors(model, 0, 1.0, settings.critic, {"reward-reward": torch.empty(1, config.hidden_size)})
        trainer = PPOTrainer(actors, tokenizer, [], [], settings, 17)
        print(f"{'model and adapters':<22} {live.now / GIB:6.2f} GiB")
        live.peak = live.now  # what building it took is not the step's

        def seen(part: str) -> None:
            line = f"{part:<22} {live.peak / GIB:6.2f} GiB at its peak, {live.now / GIB:.2f} after it"
            if given.cuda:
                line += f"; allocated on the GPU {torch.cuda.max_memory_allocated() / GIB:.2f}"
                torch.cuda.reset_peak_memory_stats()
            print(line, flush=True)
            peaks.append(live.peak)
            live.peak = live.now

        peaks: list[int] = []
        for turn in ("first step", "second step, with the gradients of the first"):
            print(turn, flush=True)
            step(trainer, given, seen)
    print(
        f"\npeak {max(peaks) / GIB:.2f} GiB: prompt {given.prompt}, answer {given.answer}, {given.batch} episodes, "
        f"microbatch {given.micro}, critic {given.critic}, "
        f"checkpointing {'on' if settings.gradient_checkpointing else 'off'}"
    )


if __name__ == "__main__":
    main()
