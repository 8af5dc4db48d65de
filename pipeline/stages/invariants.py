"""The hand-overs, proven at run time. Each check returns what it found, for the manifest, or raises BrokenInvariant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data.render import Encoded
from pipeline.errors import BrokenInvariant
from pipeline.evaluate import scoring
from pipeline.models import adapters
from pipeline.models.base import computing, frozen_digest
from pipeline.stages.stage import Context
from pipeline.stages.trainer import ends_supervised

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer

Found = dict[str, Any]
RELOAD_TOLERANCE = 1e-5
STEP_0_TOLERANCE = 1e-4


def same_base(ctx: Context, digest: str) -> Found:
    """The bytes of the base in memory are those that every parent was trained on."""
    for role, parent in ctx.parents.items():
        trained_on = (parent.manifest() or {}).get("base_digest")
        if trained_on != digest:
            raise BrokenInvariant(
                f"the base that {role} '{parent.name}' was trained on ({trained_on})",
                f"another one in memory ({digest})",
                "a base folder that was changed in place, or other quantisation by another library version",
            )
    return {"base_equals_parents": True, "adapter_equals_parents": True} if ctx.parents else {}


def starts_as_identity(model: PeftModel, ids: list[int]) -> Found:
    """A fresh adapter changes no logit: the chain starts at the base itself."""
    ids_BT = torch.tensor([ids[:64]], device=model.device)
    model.eval()
    with torch.no_grad(), computing(model):
        with_adapter_BTV = model(input_ids=ids_BT).logits
        with model.disable_adapter():
            without_BTV = model(input_ids=ids_BT).logits
    difference = (with_adapter_BTV - without_BTV).abs().max().item()
    if difference > STEP_0_TOLERANCE:
        raise BrokenInvariant(
            "a fresh adapter to leave the base's logits as they are",
            f"a difference of {difference:.2g}",
            "init_lora_weights in model.lora: only inits that start as the identity suit a frozen base",
        )
    return {"fresh_adapter_logit_difference": difference}


def only_adapter_trains(model: PeftModel, head: bool = False) -> Found:
    """What the optimizer will be given: the adapter named default (and a reward head), all in float32."""
    weights = adapters.trainable(model)
    strangers = [
        name for name in weights if ".default." not in name or not ("lora_" in name or (head and adapters.HEAD in name))
    ]
    rounded = [name for name, weight in weights.items() if weight.dtype is not torch.float32]
    headless = head and not any(adapters.HEAD in name for name in weights)
    if strangers or rounded or headless or not weights:
        found = f"{strangers[:2]} trainable beside it, {rounded[:2]} not in float32"
        raise BrokenInvariant(
            "exactly the adapter 'default' to be trainable" + (", with its score head" if head else ""),
            "no score head" if headless else "nothing trainable" if not weights else found,
            "modules_to_save in model.lora, or a library that changed what it makes trainable",
        )
    return {"trainable_parameters": sum(weight.numel() for weight in weights.values()), "trainable_dtype": "float32"}


def ends_are_learnt(sequences: list[Encoded], counts: Found, tokenizer: PreTrainedTokenizerBase) -> Found:
    """Every dialogue that was not cut carries loss on its end-of-turn token: else the model never learns to stop."""
    ends = ends_supervised(sequences, tokenizer)
    whole = counts["rows"] - counts["rows_cut"]
    if ends < whole:
        raise BrokenInvariant(
            f"an end-of-turn token with loss in all {whole} rows that are not cut",
            f"it in {ends} of {counts['rows']}",
            "a chat template that does not close the assistant's turn",
        )
    return {"rows_with_supervised_end": ends, "rows_not_cut": whole}


def reference_is_the_start(trainer: Trainer, ctx: Context) -> Found:
    """Before the first step policy and reference are one: margins are 0 and the sigmoid loss is ln 2."""
    model = trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad(), computing(model):
        loss = trainer.compute_loss(model, batch).item()
    margin = trainer._metrics["eval"]["rewards/margins"][-1]
    trainer._metrics["eval"].clear()
    plain = list(trainer.loss_types) == ["sigmoid"]
    if abs(margin) > STEP_0_TOLERANCE or (plain and abs(loss - math.log(2)) > STEP_0_TOLERANCE):
        raise BrokenInvariant(
            f"loss ln 2 = {math.log(2):.4f} and margin 0 before the first DPO step",
            f"loss {loss:.4f} and margin {margin:.4f}",
            "a reference that is not the policy this stage starts from",
        )
    return {"step_0_loss": loss, "step_0_margin": margin}


def base_unchanged(model: PeftModel, digest: str) -> Found:
    """Training has not touched a byte of the base."""
    now = frozen_digest(model)
    if now != digest:
        raise BrokenInvariant(
            f"the base's bytes as they were before training ({digest})",
            f"others ({now})",
            "a merge into the base, or a library that repacks its weights",
        )
    return {"base_unchanged": True}


def head(model: PeftModel) -> torch.Tensor:
    """A copy of the score head as it stands."""
    weights = adapters.trainable(model)
    return next(weight.detach().clone() for name, weight in weights.items() if f".{adapters.HEAD}." in name)


def head_was_trained(model: PeftModel, at_start: torch.Tensor) -> Found:
    """The score head has moved from its random start."""
    moved = (head(model) - at_start).norm().item()
    if moved == 0:
        raise BrokenInvariant(
            "the score head to move in training",
            "it exactly where it started",
            "a head left out of the optimizer, or no step beyond the warm-up",
        )
    return {"head_moved_by": moved}


def reloads_alike(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, pairs: list[tuple[list[int], list[int]]]
) -> Found:
    """The reward model read back from disk gives the scores of the one in memory."""
    sequences = [ids for pair in pairs for ids in pair]
    ours = scoring.scores(model, tokenizer, sequences)
    adapters.reloaded(model, folder, "reloaded")
    model.set_adapter("reloaded")
    theirs = scoring.scores(model, tokenizer, sequences)
    model.set_adapter("default")
    model.delete_adapter("reloaded")
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    if difference > RELOAD_TOLERANCE:
        raise BrokenInvariant(
            f"scores equal within {RELOAD_TOLERANCE} after a reload",
            f"a difference of {difference:.2g}",
            "a score head that was not saved, or saved in another dtype",
        )
    return {"reload_score_difference": difference}
