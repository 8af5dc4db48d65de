"""Four roles on one copy of the frozen base: each an adapter, two of them with a head of one output.

default    the policy: trained
reference  the policy before this stage: frozen
value      the critic: trained (with critic: trunk it is a head on the policy instead)
reward...  the reward models of earlier stages: frozen

One adapter is active at a time, and a loss is propagated back under the adapter it was computed with: with activation
checkpointing the forward pass is repeated then, under whichever adapter is active.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import linear

from pipeline.data.render import IGNORED, Encoded, padded
from pipeline.models.base import computing
from pipeline.models.forward import LanguageModel, score_states
from pipeline.models.out_of_memory import EPISODE, run_in_parts
from pipeline.plan.sizes import PPO_LOGITS
from pipeline.ppo.algorithm import log_probs, log_probs_with_slope
from pipeline.ppo.batch import Pack

POLICY, REFERENCE, VALUE = "default", "reference", "value"
Role = Literal["policy", "value"]


class Actors(LanguageModel):
    """The model with its adapters, and what each of them computes.

    `reward_heads`: for each borrowed reward adapter its score heads, (K, hidden), as they were saved.
    """

    def __init__(
        self,
        model: PeftModel,
        pad_id: int,
        temperature: float,
        critic: Literal["adapter", "trunk"] | None,
        reward_heads: dict[str, Tensor],
    ) -> None:
        super().__init__(model, pad_id)
        self.temperature = temperature
        self.value_adapter = {"adapter": VALUE, "trunk": POLICY, None: None}[critic]
        self.reward_heads = {name: weight.to(self.device, torch.float32) for name, weight in reward_heads.items()}
        self.value_head = torch.nn.Linear(self.config.hidden_size, 1, device=self.device, dtype=torch.float32)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.act_as(POLICY)

    def drop_nothing(self) -> None:
        """Ratios compare a policy with itself; under dropout it would differ from itself (arXiv 2403.17031, detail
        11)."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0  # type: ignore[assignment]

    def act_as(self, adapter: str) -> None:
        """Make one adapter the active one; the trained ones also take gradients while they are."""
        self.model.set_adapter(adapter, inference_mode=adapter not in (POLICY, VALUE))

    def policy(self, pack: Pack, adapter: str = POLICY, way_back: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities of the answers' tokens, the entropies there, and with critic: trunk the values; all (B, G).

        Leaves `adapter` active, so that the caller's backward pass runs under it. Without `way_back` the LM head
        prepares none, and entropies are zeros.
        """
        self.act_as(adapter)
        with computing(self.model):
            states_NH = self._states(pack)
            before_NH = states_NH if way_back else states_NH.detach()
            logp_N, entropy_N = self._log_probs(before_NH, pack.token_N, self.temperature)
        shared = adapter == POLICY == self.value_adapter
        values_BG = pack.lay_out(self.state_values(states_NH)) if shared else None
        return pack.lay_out(logp_N), pack.lay_out(entropy_N), values_BG

    def texts(self, texts: Sequence[Encoded]) -> Tensor:
        """The policy's log-probabilities (N,), at temperature 1, of the tokens of texts that carry loss, row after row;
        leaves it active. A text's first token follows nothing, so nothing predicts it."""
        self.act_as(POLICY)
        ids_BT, mask_BT = (tensor.to(self.device) for tensor in padded([text.ids for text in texts], self.pad_id))
        labels_BT = padded([text.labels for text in texts], IGNORED)[0][:, 1:]
        row_N, state_N = (places_N.to(self.device) for places_N in (labels_BT != IGNORED).nonzero(as_tuple=True))
        with computing(self.model):
            states_NH = self.hidden(ids_BT, mask_BT)[row_N, state_N]
            logp_N, _ = self._log_probs(states_NH, ids_BT[row_N, state_N + 1], temperature=1.0)
        return logp_N

    def values(self, pack: Pack) -> Tensor:
        """The critic's values of the states before the answers' tokens, (B, G); leaves its adapter active."""
        assert self.value_adapter
        self.act_as(self.value_adapter)
        with computing(self.model):
            states_NH = self._states(pack)
        return pack.lay_out(self.state_values(states_NH))

    def scores(self, reward: str, sequences: Sequence[list[int]], at_once: int) -> list[float]:
        """A borrowed reward model's score of each sequence: the mean over its heads."""
        return [sum(heads_K) / len(heads_K) for heads_K in self.head_scores(reward, sequences, at_once)]

    @torch.no_grad()
    def head_scores(self, reward: str, sequences: Sequence[list[int]], at_once: int) -> list[list[float]]:
        """What each head of a borrowed reward model says of each sequence, (N, K), read at its last token, in float32
        as in training; no LM head is run. Sequences that are alike are read once."""
        self.act_as(reward)
        heads_KH = self.reward_heads[reward]

        def of(batch: Sequence[int]) -> list[list[float]]:
            ids_BT, mask_BT = (t.to(self.device) for t in padded([sequences[i] for i in batch], self.pad_id))
            with computing(self.model):
                hidden_BTH = self.hidden(ids_BT, mask_BT)
            return linear(score_states(hidden_BTH, mask_BT), heads_KH).tolist()

        first = {tuple(ids): index for index, ids in reversed(list(enumerate(sequences)))}
        order = sorted(first.values(), key=lambda i: (len(sequences[i]), i))
        parts = run_in_parts(of, order, lambda i: len(sequences[i]), EPISODE, at_once)
        values = dict(zip(order, itertools.chain.from_iterable(parts), strict=True))
        self.act_as(POLICY)
        return [values[first[tuple(ids)]] for ids in sequences]

    def start_values_from(self, reward: str, mean: float, std: float, weight: float) -> None:
        """The critic begins as the reward model: its head, in the units of normalised scores."""
        with torch.no_grad():
            self.value_head.weight.copy_(self.reward_heads[reward].mean(0, keepdim=True) * (weight / std))
            self.value_head.bias.fill_(-mean / std)

    def trained(self, role: Role) -> dict[str, torch.nn.Parameter]:
        """The float32 parameters of a role, by name."""
        adapter = POLICY if role == "policy" else VALUE
        weights = {name: weight for name, weight in self.model.named_parameters() if f".{adapter}." in name}
        if role == "value":
            weights |= {f"value_head.{name}": weight for name, weight in self.value_head.named_parameters()}
        return weights

    def _states(self, pack: Pack) -> Tensor:
        """Hidden states (N, hidden) before the answers' tokens, row after row."""
        return self.hidden(pack.ids_BT, pack.mask_BT)[pack.row_N, pack.state_N]

    def _log_probs(self, states_NH: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.lm_head.parameters()):
            raise ValueError(
                "PPO keeps the LM head frozen, and an adapter trains it: leave lm_head out of target_modules"
            )
        logp_N, entropy_N = _HeadLogProbs.apply(states_NH, ids_N, self, temperature)  # type: ignore[no-untyped-call]
        return logp_N, entropy_N

    def state_values(self, states_NH: Tensor) -> Tensor:
        """The values (N,) of hidden states (N, hidden)."""
        return self.value_head(states_NH.float()).squeeze(-1)  # type: ignore[no-any-return]


class _HeadLogProbs(torch.autograd.Function):
    """Log-probabilities (N,) of tokens from the hidden states (N, hidden) before them, and with gradients the entropies
    there, else zeros.

    A token's log-probability depends on its own state alone and the head is frozen, so its gradient with respect to
    the state, a vector of the hidden size, is all that the way back needs. It is computed with the logits at hand, part
    after part; neither logits nor anything else of the vocabulary's size is kept, and nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, ids_N: Tensor, actors: Actors, temperature: float
    ) -> tuple[Tensor, Tensor]:
        size = max(1, PPO_LOGITS // actors.config.vocab_size)
        logp, entropy, gradients = [], [], list[Tensor]()
        for states_nH, ids_n in zip(torch.split(states_NH, size), torch.split(ids_N, size), strict=True):
            if not ctx.needs_input_grad[0]:
                logp.append(log_probs(actors.logits(states_nH), ids_n, temperature))
                entropy.append(torch.zeros_like(logp[-1]))
                continue
            leaf_nH = states_nH.detach().requires_grad_()
            with torch.enable_grad():
                logits_nV = actors.logits(leaf_nH)
            logp_n, entropy_n, slope_nV = log_probs_with_slope(logits_nV.detach(), ids_n, temperature)
            gradients += torch.autograd.grad(logits_nV, leaf_nH, slope_nV)
            logp.append(logp_n)
            entropy.append(entropy_n)
            del logits_nV, slope_nV  # else the next part's would stand beside them
        ctx.save_for_backward(*gradients)
        entropy_N = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy_N)
        return torch.cat(logp), entropy_N

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        gradient_NH = torch.cat(ctx.saved_tensors)
        return (upstream_N[:, None] * gradient_NH).to(gradient_NH.dtype), None, None, None
