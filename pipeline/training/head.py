"""The LM head's log-probabilities in one pass on a CPU, in place of TRL's tiles over the vocabulary.

TRL 1.16 computes the logits twice, in the forward and again in the backward pass, and multiplies the backward ones in
float32, which takes a CPU several times as long as bfloat16. The head is frozen here, so the gradient of each token's
log-probability with respect to its hidden state is known once its logits are: it is kept (N, hidden) and the logits are
not. Its product is one over the whole vocabulary, rounded once, as without tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

LOGITS_AT_ONCE = 1 << 23


class HeadInOnePass(torch.autograd.Function):
    """TRL's ChunkedLogProbFunction by its arguments and results, on a CPU under a head that does not train."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, None, Tensor | None, Tensor | None]:
        """log p of each target, (N,) in float32; with "entropy" in `outputs` the entropy in nats, and with "is_top1"
        whether the target is the likeliest token, with "mean_logits" the mean of all logits; for figures only: they
        carry no gradient."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else hidden_NH.dtype
        weight_VH, bias_V = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        size = max(1, LOGITS_AT_ONCE // len(weight_VH))
        logp_N = torch.empty(len(hidden_NH))
        entropy_N = torch.empty(len(hidden_NH)) if "entropy" in outputs else None
        top_N = torch.empty(len(hidden_NH), dtype=torch.bool) if "is_top1" in outputs else None
        mean_N = torch.empty(len(hidden_NH)) if "mean_logits" in outputs else None
        slope_NH = torch.empty_like(hidden_NH, dtype=dtype) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_NH), size):
            part = slice(start, start + size)
            logits_nV = torch.nn.functional.linear(hidden_NH[part].to(dtype), weight_VH, bias_V).float()
            inner_nV = torch.tanh(logits_nV * (logit_scale / softcap)) if softcap else None
            logits_nV = inner_nV * softcap if inner_nV is not None and softcap else logits_nV.mul_(logit_scale)
            if temperature != 1.0:
                logits_nV = logits_nV / temperature
            targets_n1 = targets_N[part, None]
            total_n1 = logits_nV.logsumexp(1, keepdim=True)
            logp_N[part] = (logits_nV.gather(1, targets_n1) - total_n1)[:, 0]
            if top_N is not None:
                top_N[part] = logits_nV.argmax(1) == targets_n1[:, 0]
            if mean_N is not None:
                mean_N[part] = logits_nV.mean(1)
            if entropy_N is None and slope_NH is None:
                continue
            chances_nV = (logits_nV - total_n1).exp_()
            if entropy_N is not None:
                entropy_N[part] = total_n1[:, 0] - torch.linalg.vecdot(chances_nV, logits_nV)
            if slope_NH is not None:
                # d log p(target) / d logit = 1[target] - p
                slope_nV = chances_nV.neg_().scatter_add_(1, targets_n1, torch.ones_like(total_n1))
                if inner_nV is not None:
                    slope_nV *= 1 - inner_nV.square_()
                slope_NH[part] = slope_nV.to(dtype) @ weight_VH
        ctx.factor, ctx.dtype = logit_scale / temperature, hidden_NH.dtype
        ctx.save_for_backward(*([slope_NH] if slope_NH is not None else []))
        ctx.mark_non_differentiable(*(values for values in (entropy_N, mean_N, top_N) if values is not None))
        return logp_N, entropy_N, None, mean_N, top_N

    @staticmethod
    def backward(ctx: Any, slope_N: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (slope_NH,) = ctx.saved_tensors
        gradient_NH = slope_NH * (slope_N * ctx.factor)[:, None]
        return gradient_NH.to(ctx.dtype), *[None] * 7


class Head:
    """In place of ChunkedLogProbFunction in TRL's trainers: one pass on a CPU, else TRL's own."""

    @staticmethod
    def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *more: Any) -> Any:
        trls: Any = ChunkedLogProbFunction
        temperature, _, softcap, logit_scale, outputs = more
        simple = set(outputs) <= {"log_probs", "entropy", "mean_logits", "is_top1"} and not weight.requires_grad
        if hidden.device.type != "cpu" or not simple:
            return trls.apply(hidden, weight, bias, targets, *more)
        function: Any = HeadInOnePass
        return function.apply(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs)
