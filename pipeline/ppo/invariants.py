"""What PPO's hand-overs promise, proven at run time. Each check returns what it found, for the manifest, or raises
BrokenInvariant."""

from __future__ import annotations

import gc
from typing import Any

import numpy
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.disk.artifact import Artifact
from pipeline.errors import BrokenInvariant, UserError
from pipeline.models.base import computing
from pipeline.ppo.actors import REFERENCE, Actors
from pipeline.ppo.batch import pack_episodes
from pipeline.ppo.scoring import as_updates_see
from pipeline.ppo.trainer import RolloutTrainer

Found = dict[str, Any]
BORROWED_TOLERANCE = {"float32": 1e-5}
"""Of a reward model's score on the policy's base, by dtype; 1e-3 in half precision."""
COMPARED = 32
"""Tokens of an answer that policy and reference are compared on before the first step."""


def scores_as_it_did(actors: Actors, adapter: str, parent: Artifact, dtype: str) -> Found:
    """A borrowed reward adapter gives the scores the reward stage itself gave."""
    probed = parent.finished().invariants.get("probe", [])
    if not probed:
        raise UserError(f"{parent.folder} holds no scores to compare with. Run '{parent.name}' again.")
    ours_NK = numpy.array([actors.head_scores(adapter, [one["ids"]], 1)[0] for one in probed])
    theirs_NK = numpy.reshape([one["score"] for one in probed], (len(probed), -1))
    if ours_NK.shape != theirs_NK.shape:
        raise BrokenInvariant(
            f"the {theirs_NK.shape[1]} score heads that '{parent.name}' was trained with",
            f"{ours_NK.shape[1]} of them",
            "an adapter folder that was changed by hand",
        )
    difference = float(numpy.abs(ours_NK - theirs_NK).max())
    tolerance = BORROWED_TOLERANCE.get(dtype, 1e-3)
    if not difference <= tolerance:
        raise BrokenInvariant(
            f"the scores of '{parent.name}' through its borrowed adapter within {tolerance}",
            f"a difference of {difference:.2g}",
            "a reward model trained on other weights, or a score head lost or rounded",
        )
    return {f"borrowed_score_difference_{parent.name}": difference}


def same_tokenizer(tokenizer: PreTrainedTokenizerBase, parent: Artifact) -> None:
    """A reward model was trained on the tokens and the chat template that the policy speaks."""
    theirs = AutoTokenizer.from_pretrained(parent.adapter)
    for what, ours_is, theirs_is in (
        ("vocabulary", tokenizer.get_vocab(), theirs.get_vocab()),
        ("chat template", tokenizer.chat_template, theirs.chat_template),
    ):
        if ours_is != theirs_is:
            raise UserError(
                f"the reward model of '{parent.name}' was trained with another {what} than this stage's: "
                f"run '{parent.name}' again with this recipe's model section"
            )


def policy_is_reference(trainer: RolloutTrainer) -> Found:
    """Before the first step the policy is its reference: KL exactly 0, and its ratio to itself exactly 1. Each compares
    passes made alike: KL two without gradients, the ratio two as updates are made of.

    Also: what the LM head gives here is what the model's own forward gives.
    """
    actors, settings = trainer.actors, trainer.settings
    # The beginnings of two episodes show it as well as all, and take less memory than training does.
    episodes = [
        episode.cut(COMPARED)
        for episode in trainer.answer(trainer.rows[: min(2, trainer.pack_size)], "step 0").episodes
    ]
    pack = pack_episodes(episodes, trainer.pack_size, actors.pad_id, actors.device)[0]
    with torch.no_grad():
        reference_BG = actors.policy(pack, REFERENCE)[0]
        old_BG = actors.policy(pack)[0]
        with computing(actors.model):
            first = int(pack.state_N.min())
            logits_BTV = actors.model(
                input_ids=pack.ids_BT, attention_mask=pack.mask_BT, use_cache=False,
                logits_to_keep=pack.ids_BT.shape[1] - first,
            ).logits  # fmt: skip
        logp_NV = torch.log_softmax(logits_BTV[pack.row_N, pack.state_N - first].float() / settings.temperature, -1)
        own_N = logp_NV.gather(-1, pack.token_N[:, None]).squeeze(-1)
    before_BG = as_updates_see(actors, pack)[0]
    actors.model.train()
    new_BG = actors.policy(pack)[0].detach()
    actors.model.eval()
    sampled_BG = pack.lay_out_lists([episode.logp for episode in episodes])
    kl, ratio = (old_BG - reference_BG).abs().max(), (torch.exp(new_BG - before_BG) - 1).abs().max()
    own = (own_N - old_BG[pack.row_N, pack.column_N]).abs().max()
    sampler = (sampled_BG - old_BG).abs().sum() / pack.mask_BG.sum()
    checks = {
        "step_0_kl": (kl, 0.0, "a reference that is not the policy this stage starts from"),
        "step_0_ratio_minus_1": (ratio, 0.0, "dropout, or another forward pass in training than at scoring"),
        "step_0_logp_against_own_forward": (own, 0.25, "an architecture that changes its logits after the LM head"),
        "step_0_logp_against_sampler": (sampler, 0.1, "a mask or positions that differ between sampling and training"),
    }
    for name, (value, limit, cause) in checks.items():
        if not value <= limit:
            raise BrokenInvariant(f"{name} of at most {limit:g} before the first PPO step", f"{value:.3g}", cause)
    return {name: value.item() for name, (value, _, _) in checks.items()}


def one_copy_of_the_base(model: PeftModel) -> Found:
    """All large frozen weights alive in this process are those of this one model."""
    large = 1 << 10
    own = {w.data_ptr() for w in model.parameters() if not w.requires_grad and w.numel() >= large}
    gc.collect()
    # By type(), not isinstance(): that would wake every lazy object there is.
    parameters = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Parameter)]
    alive = {weight.data_ptr() for weight in parameters if not weight.requires_grad and weight.numel() >= large}
    if alive - own:
        raise BrokenInvariant(
            "one copy of the base in memory", f"{len(alive - own)} large frozen tensors beside it", "a second model"
        )
    return {"copies_of_the_base": 1}
