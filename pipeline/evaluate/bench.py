"""One loaded base under which every stage's adapter is at hand: what all measures are taken with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.forward import plain_on_cpu
from pipeline.models.spec import ModelSpec
from pipeline.ppo.actors import POLICY, Actors
from pipeline.ppo.batch import pack_episodes
from pipeline.ppo.rewards import adapter_name
from pipeline.stages.stage import BASE


class Bench:
    """The base, the policies' adapters and the reward models', frozen.

    `policies`: adapter folder of each policy stage. `rewards`: of each reward stage.
    """

    at_once = 64
    """Sequences that pass through the model together."""

    def __init__(
        self, spec: ModelSpec, policies: dict[str, Path], rewards: dict[str, Path], temperature: float
    ) -> None:
        self.tokenizer = bases.load_tokenizer(spec)
        base = bases.load_base(spec, self.tokenizer)
        self.model = adapters.fresh(base, spec.lora)
        for name, folder in policies.items():
            adapters.borrowed(self.model, _adapter(name), folder)
        heads = {}
        for name, folder in rewards.items():
            head = adapters.borrowed(self.model, adapter_name(name), folder)
            assert head is not None, f"{folder} holds no score head"
            heads[adapter_name(name)] = head
        self.model.requires_grad_(False)
        self.model.eval()
        self.actors = Actors(self.model, self.tokenizer.pad_token_id, temperature, "trunk", heads)

    @contextlib.contextmanager
    def ready(self) -> Iterator[Bench]:
        """On a CPU most of a forward pass would go into dequantising, so it is done once for all measures."""
        with plain_on_cpu(self.model), torch.no_grad():
            yield self

    @contextlib.contextmanager
    def acting_as(self, policy: str) -> Iterator[None]:
        """Inside, the model is that policy."""
        self.actors.act_as(POLICY if policy == BASE else _adapter(policy))
        with self.model.disable_adapter() if policy == BASE else contextlib.nullcontext():
            yield
        self.actors.act_as(POLICY)

    @contextlib.contextmanager
    def sampling_as(self, policy: str) -> Iterator[None]:
        """Inside, the model is that policy and meant for sampling alone: on a CPU its adapter is added into the plain
        matrices, as PPO samples with `dequantize_rollout`, which saves a third of the time of a token."""
        with self.acting_as(policy), plain_on_cpu(self.model, fold_adapter=True):
            yield

    def log_probs(self, policy: str, episodes: list, at_once: int) -> list[float]:  # type: ignore[type-arg]
        """log p(answer | prompt) of each episode under a policy, in nats, at the sampling temperature. Those alike are
        read once."""
        keys = [(tuple(episode.prompt_ids), tuple(episode.answer_ids)) for episode in episodes]
        first = dict(zip(keys, episodes, strict=True))
        totals: list[float] = [0.0] * len(first)
        for pack in pack_episodes(list(first.values()), at_once, self.actors.pad_id, self.actors.device):
            # `policy` of Actors makes the adapter it is given the active one, so the base's is the identity.
            logp_BG = self.actors.policy(pack, POLICY if policy == BASE else _adapter(policy))[0]
            for row, total in zip(pack.rows, logp_BG.sum(1).tolist(), strict=True):
                totals[row] = total
        self.actors.act_as(POLICY)
        values = dict(zip(first, totals, strict=True))
        return [values[key] for key in keys]


def _adapter(stage: str) -> str:
    return f"policy-{stage}"
