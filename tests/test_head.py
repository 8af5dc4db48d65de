"""The LM head in one pass gives what TRL's own function gives: values and gradients, under scaling and capping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from pipeline.training import head

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.mark.parametrize("capped", [None, 3.0])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 0.25)])
def test_values_and_gradients_are_trls(
    temperature: float, scale: float, capped: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(23, 16) * 3, torch.randn(501, 16), torch.randn(501)
    targets, upstream = torch.randint(0, 501, (23,)), torch.randn(23)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 4 * 501)

    def of(function: Any) -> tuple[Any, torch.Tensor]:
        own = hidden.clone().requires_grad_()
        found = function.apply(own, weight, bias, targets, temperature, 128, capped, scale, OUTPUTS)
        (found[0] * upstream).sum().backward()
        return found, own.grad

    (ours, our_gradient), (theirs, their_gradient) = of(head.Head), of(ChunkedLogProbFunction)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    logits = (hidden.double() @ weight.double().T + bias) * scale
    logits = capped * torch.tanh(logits / capped) if capped else logits
    exact = torch.distributions.Categorical(logits=logits / temperature).entropy()
    assert torch.allclose(ours[1].double(), exact, atol=2e-4) and torch.allclose(theirs[1].double(), exact, atol=2e-4)
    assert torch.equal(ours[4], theirs[4]) and ours[2] is None
    assert torch.allclose(ours[3], theirs[3], atol=1e-5)
    assert torch.allclose(our_gradient, their_gradient, atol=1e-5)


def test_in_bfloat16_the_gradient_is_as_near_as_that_of_full_logits() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 64), torch.randn(2000, 64)
    targets = torch.randint(0, 2000, (200,))

    def gradient(log_probs: Any, dtype: torch.dtype) -> torch.Tensor:
        own = hidden.clone().to(dtype).detach().requires_grad_()
        log_probs(own, weight.to(dtype)).float().sum().backward()
        return own.grad.float()

    def whole(own: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return (own @ matrix.T).float().log_softmax(1).gather(1, targets[:, None])

    def at_once(own: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return head.Head.apply(own, matrix, None, targets, 1.0, 512, None, 1.0, ("log_probs",))[0]

    exact = gradient(whole, torch.float32)
    ours, usual = (gradient(function, torch.bfloat16) - exact for function in (at_once, whole))
    assert ours.norm() <= 1.1 * usual.norm()


def test_a_head_that_trains_is_left_to_trl() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(50, 8, requires_grad=True)
    found = head.Head.apply(hidden, weight, None, torch.arange(5), 1.0, 512, None, 1.0, ("log_probs",))
    found[0].sum().backward()
    assert weight.grad is not None
