"""The hand-overs, proven at run time. Each check returns what it found, for the manifest, or raises BrokenInvariant."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from pipeline.data.render import Encoded
from pipeline.data.tokens import stop_ids
from pipeline.disk import versions
from pipeline.errors import BrokenInvariant, UserError
from pipeline.measure import scoring
from pipeline.models import adapters, processes
from pipeline.models.base import computing, frozen_digest
from pipeline.models.out_of_memory import ROW, run_in_parts
from pipeline.models.spec import unpackable
from pipeline.training import micro_batches

if TYPE_CHECKING:
    from pipeline.stages.stage import Context

Found = dict[str, Any]
APART = 16
"""Tokens of a row that is tried behind another."""
APART_TOLERANCE = 1e-2
"""Of logits, relative. Where rows are apart it is 0, or the rounding of experts that sort their tokens otherwise."""
RELOAD_TOLERANCE = 1e-5
STEP_0_TOLERANCE = 1e-4
PRECOMPUTED_TOLERANCE = 0.02
"""Nats a token by which a reference's log-probabilities may differ in a batch of another padding, in half precision."""


def same_base(ctx: Context, digest: str) -> Found:
    """The bytes of the base in memory are those that every parent was trained on."""
    for role, parent in ctx.parents.items():
        manifest = parent.finished()
        if manifest.base_digest != digest:
            here = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
            version = manifest.versions.get("bitsandbytes", "unknown")
            raise BrokenInvariant(
                f"the base that {role} '{parent.name}' was trained on ({manifest.base_digest}, on {manifest.device}, "
                f"bitsandbytes {version})",
                f"another one in memory ({digest}, on {here}, bitsandbytes {versions.installed()['bitsandbytes']})",
                "a base folder that was changed in place, or one quantised to other bytes: whether a CPU and a GPU "
                "make the same ones, or two versions of bitsandbytes, is not known.\n"
                f"  to do: run the whole chain on one kind of device, with one version. Either run '{parent.name}' and "
                f"what it goes on from here again (delete {parent.folder}), or this stage where '{parent.name}' ran",
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


def packed_rows_are_apart(model: PeftModel, stage: str, ids: list[int]) -> Found:
    """Rows that lie end to end do not see each other: what stands in the first changes nothing of the second. In layers
    that carry a state along a row, it does. Raises UserError where it does.
    """
    row = torch.tensor(ids[:APART], device=model.device)
    others = (row, (row + 1) % model.get_input_embeddings().num_embeddings)
    positions_1N = torch.arange(len(row), device=model.device).repeat(2)[None]
    model.eval()
    with torch.no_grad(), computing(model):
        seen, changed = (
            model(input_ids=torch.cat([other, row])[None], position_ids=positions_1N, use_cache=False)
            .logits[0, len(row) :]
            .float()
            for other in others
        )
    difference = ((seen - changed).abs().mean() / seen.abs().mean()).item()
    if difference > APART_TOLERANCE:
        raise UserError(unpackable(stage, "a row's logits change with the row before it"))
    return {"packed_row_difference": difference}


def only_adapter_trains(model: PeftModel, head: bool = False) -> Found:
    """What the optimizer will be given: the adapter named default (and a reward head), all in float32."""
    weights = adapters.trainable(model)
    strangers = [
        name for name in weights if ".default." not in name or not ("lora_" in name or (head and adapters.HEAD in name))
    ]
    rounded = [name for name, weight in weights.items() if weight.dtype is not torch.float32]
    headless = head and not any(adapters.HEAD in name for name in weights)
    if strangers or rounded or headless or not weights:
        faults = f"{strangers[:2]} trainable beside it, {rounded[:2]} not in float32"
        raise BrokenInvariant(
            "exactly the adapter 'default' to be trainable" + (", with its score head" if head else ""),
            "no score head" if headless else "nothing trainable" if not weights else faults,
            "modules_to_save in model.lora, or a library that changed what it makes trainable",
        )
    return {"trainable_parameters": sum(weight.numel() for weight in weights.values()), "trainable_dtype": "float32"}


def ends_are_learnt(sequences: Sequence[Encoded], counts: Found, tokenizer: PreTrainedTokenizerBase) -> Found:
    """Every dialogue that was not cut carries loss on its end-of-turn token: else the model never learns to stop."""
    stops = set(stop_ids(tokenizer))
    ends = sum(any(label in stops for label in sequence.labels) for sequence in sequences)
    whole = len(sequences) - counts["rows_cut"]
    if ends < whole:
        raise BrokenInvariant(
            f"an end-of-turn token with loss in all {whole} rows that are not cut",
            f"it in {ends} of {len(sequences)}",
            "a chat template that does not close the assistant's turn: name another one as model.chat_template",
        )
    return {"rows_with_supervised_end": ends, "rows_not_cut": whole}


def reference_is_the_start(trainer: Any) -> Found:
    """Before the first step policy and reference are one: each answer of the first batch is as likely under both.

    Log-ratios (nats, of an answer) say so under every loss. Where the loss is the plain sigmoid it is ln 2 as well.
    Reference log-probabilities computed beforehand come from other batches, so they are equal up to rounding only.
    """
    model = trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    seen = trainer._metrics["eval"]

    def measure(pairs: Sequence[int]) -> list[tuple[float, float, float]]:
        """Loss, margin and the largest log-ratio of each pair."""
        measured = []
        for pair in pairs:
            part = micro_batches.part(batch, pair, pair + 1)
            with torch.no_grad(), computing(model):
                loss = trainer.compute_loss(model, part).item()
            rewards = [abs(seen[f"rewards/{side}"][-1]) for side in ("chosen", "rejected")]
            tokens = part["completion_mask"].sum(1).tolist() if trainer.precompute_ref_logps else [1, 1]
            ratios = [reward / (trainer.beta or 1) / n for reward, n in zip(rewards, tokens, strict=True)]
            measured.append((loss, seen["rewards/margins"][-1], math.nan if math.nan in ratios else max(ratios)))
        return measured

    length, pairs = batch["input_ids"].shape[1], range(micro_batches.rows(batch))
    parts = run_in_parts(measure, pairs, lambda _: length, ROW)
    seen.clear()
    losses, margins, ratios = zip(*itertools.chain.from_iterable(parts), strict=True)
    loss, margin, ratio = sum(losses) / len(pairs), sum(margins) / len(pairs), max(ratios)
    beforehand = trainer.precompute_ref_logps
    plain = trainer.loss_types == ["sigmoid"] and trainer.loss_weights == [1.0]
    plain = plain and not (beforehand or trainer.use_weighting or trainer.aux_loss_enabled)
    tolerance, unit = (PRECOMPUTED_TOLERANCE, "a token") if beforehand else (STEP_0_TOLERANCE, "an answer")
    if not ratio <= tolerance or (plain and not abs(loss - math.log(2)) <= STEP_0_TOLERANCE):
        raise BrokenInvariant(
            f"every answer as likely under the policy as under its reference before the first DPO step, within "
            f"{tolerance} nats {unit}" + (f", and the loss ln 2 = {math.log(2):.4f}" if plain else ""),
            f"a difference of {ratio:.4f}, margin {margin:.4f}, loss {loss:.4f}",
            "a reference that is not the policy this stage starts from",
        )
    return {"step_0_loss": loss, "step_0_margin": margin, "step_0_log_ratio": ratio}


def rated_reference_is_the_start(trainer: Any) -> Found:
    """The same before the first step of KTO: each answer of the first batch, and each prompt with another's answer, is
    as likely under both, so that the KL term is 0 and the loss of an answer half of its weight.
    """
    model = trainer.model.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    seen = trainer._metrics["eval"]
    beforehand = trainer.precompute_ref_logps

    def measure(rows: Sequence[int]) -> list[tuple[float, float, float, float]]:
        """Loss, half of the weight, log-ratio and KL term of each row."""
        measured = []
        for row in rows:
            seen.clear()
            part = micro_batches.part(batch, row, row + 1)
            with torch.no_grad(), computing(model):
                loss = trainer.compute_loss(model, part).item()
            good = bool(part["label"].item())
            weight = trainer.desirable_weight if good else trainer.undesirable_weight
            ratio = abs(seen["rewards/chosen" if good else "rewards/rejected"][-1]) / (trainer.beta or 1)
            tokens = part["completion_mask"].sum().item() if beforehand else 1
            measured.append((loss, weight / 2, ratio / tokens, seen["kl"][-1] / tokens))
        return measured

    length, rows = batch["input_ids"].shape[1], range(micro_batches.rows(batch))
    parts = run_in_parts(measure, rows, lambda _: length, ROW)
    seen.clear()
    losses, halves, ratios, kls = (list(values) for values in zip(*itertools.chain.from_iterable(parts), strict=True))
    loss, half, ratio, kl = sum(losses) / len(rows), sum(halves) / len(rows), max(ratios), max(kls)
    plain = not (beforehand or trainer.aux_loss_enabled)
    tolerance, unit = (PRECOMPUTED_TOLERANCE, "a token") if beforehand else (STEP_0_TOLERANCE, "an answer")
    if not max(ratio, kl) <= tolerance or (plain and not abs(loss - half) <= STEP_0_TOLERANCE):
        raise BrokenInvariant(
            f"every answer as likely under the policy as under its reference before the first KTO step, within "
            f"{tolerance} nats {unit}" + (f", and the loss half of the answers' weights, {half:.4f}" if plain else ""),
            f"a difference of {ratio:.4f}, KL {kl:.4f}, loss {loss:.4f}",
            "a reference that is not the policy this stage starts from",
        )
    return {"step_0_loss": loss, "step_0_kl": kl, "step_0_log_ratio": ratio}


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
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, groups: Sequence[tuple[list[int], ...]]
) -> Found:
    """The model read back from disk gives the scores of the one in memory. `groups`: token ids of what is scored."""
    sequences = [ids for group in groups for ids in group]
    ours = scoring.scores(model, tokenizer, sequences)
    adapters.reloaded(model, folder, "reloaded")
    model.set_adapter("reloaded")
    theirs = scoring.scores(model, tokenizer, sequences)
    model.set_adapter("default")
    model.delete_adapter("reloaded")
    difference = float(numpy.abs(numpy.subtract(ours, theirs)).max())
    if difference > RELOAD_TOLERANCE:
        raise BrokenInvariant(
            f"scores equal within {RELOAD_TOLERANCE} after a reload",
            f"a difference of {difference:.2g}",
            "a score head that was not saved, or saved in another dtype",
        )
    return {"reload_score_difference": difference}


def probe(model: PeftModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[list[int], list[int]]]) -> Found:
    """A reward model's own scores of a few sequences, each alone, for the stages that borrow it to compare with."""
    sequences = [ids for pair in pairs for ids in pair]
    return {"probe": [{"ids": ids, "score": scoring.scores(model, tokenizer, [ids])[0]} for ids in sequences]}


def processes_agree(trained: dict[str, torch.nn.Parameter]) -> Found:
    """Every process ends with the same bytes in what was trained."""
    count = PartialState().num_processes
    if count == 1:
        return {}
    total = hashlib.sha256()
    for name, weight in sorted(trained.items()):
        total.update(name.encode() + weight.detach().cpu().numpy().tobytes())
    if len(set(processes.gather(total.hexdigest()))) > 1:
        raise BrokenInvariant(
            f"the same adapter in all {count} processes", "different ones", "a gradient that was not reduced"
        )
    return {"processes": count, "adapters_equal_on_all_processes": True}
