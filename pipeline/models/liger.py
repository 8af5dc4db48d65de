"""Liger's RMSNorm and SwiGLU (arXiv 2410.10989) in place of the base's: one kernel each, where torch starts several."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def check(model_type: str | None, stage: str) -> None:
    """Raises UserError naming the stage where its base cannot have these kernels here. model_type: of config.json, None
    where it is not known yet."""
    import torch

    key = f"stages.{stage}.train.use_liger_kernel"
    if not torch.cuda.is_available():
        raise UserError(f"{key}: it is for GPUs, and there is no GPU here; leave it out")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(f"{key}: Liger is not installed. Install it (pip install 'onebase[liger]'), or leave it out")
    if model_type is not None:
        _patcher(model_type, stage)


def apply(base: PreTrainedModel, stage: str) -> None:
    """Have this model compute its RMSNorms, and its gated SiLU layers, by Liger. All else stays: losses, rotary
    positions, experts, other activations.

    Raises UserError naming the stage if Liger has nothing for such a model.
    """
    config = base.config.get_text_config()
    gated = getattr(config, "hidden_act", "") in ("silu", "swish")  # Liger does not look: it computes SiLU in any case
    experts = any(getattr(config, name, None) for name in EXPERTS)
    wanted = {"rms_norm", "swiglu"} if gated and not experts else {"rms_norm"}
    put_in = _patcher(base.config.model_type, stage)
    switches = {name for name, one in inspect.signature(put_in).parameters.items() if isinstance(one.default, bool)}
    # It exchanges classes in transformers' module as well, for models made later, which nobody has asked about.
    module = vars(sys.modules[type(base).__module__])
    as_it_was = dict(module)
    try:
        put_in(model=base, **{name: name in wanted for name in switches})
    except TypeError as error:  # of some families it takes the language model and not the one with a score head
        raise _unknown(type(base).__name__, stage) from error
    finally:
        module.update(as_it_was)


def _patcher(model_type: str, stage: str) -> Callable[..., None]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    found: Callable[..., None] | None = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if found is None or "rms_norm" not in inspect.signature(found).parameters:
        raise _unknown(model_type, stage)
    return found


def _unknown(kind: str, stage: str) -> UserError:
    return UserError(f"stages.{stage}.train.use_liger_kernel: Liger has no RMSNorm for '{kind}'; leave it out")
