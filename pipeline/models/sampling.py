"""Answers sampled from the policy, and what is kept of them.

No logits are stored: of each step the log-probability of the sampled token stays, nothing else. Prompts of like length
are sampled together, and finished answers leave the batch, so that the long ones do not drag the short along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from pipeline.data.render import padded
from pipeline.models.base import computing
from pipeline.models.cache import make_cache, take_rows
from pipeline.models.out_of_memory import HELD_OUT, WhenSplit, run_in_parts, say_split

if TYPE_CHECKING:
    from pipeline.models.forward import LanguageModel

SHRINK_BELOW = 0.75
"""Share of a batch's rows still unfinished under which the finished ones are taken out of it."""


@dataclass
class Episode:
    """One prompt and the policy's answer, which runs through its end-of-turn token if it has one. Where the policy
    calls tools, their replies stand in the answer too, and nothing but what it sampled is ever learnt from."""

    prompt_ids: list[int]
    answer_ids: list[int]
    logp: list[float]
    """Of each sampled token, at the sampling temperature, as the sampler computed it."""
    ended: bool
    """It ended by itself, not at a limit of length or of calls."""
    values: list[float] = field(default_factory=list)
    """A critic's, of the states before the sampled tokens, where one was asked along."""
    tool_mask: list[int] = field(default_factory=list)
    """As TRL's: for each token of the answer 1 if the policy sampled it, 0 if a tool's reply holds it. Empty: all are
    sampled."""
    sampling_logp: list[float] = field(default_factory=list)
    """Of each token, by the engine that sampled it, where it was one (ppo/engine.py); `logp` is then by a pass of the
    model's own over the same tokens."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def sampled(self) -> list[int]:
        """The places in the answer of the tokens that the policy sampled."""
        return [place for place, own in enumerate(self.tool_mask or [1] * len(self.answer_ids)) if own]

    def cut(self, tokens: int) -> Episode:
        """With so many tokens of the answer at most."""
        mask = self.tool_mask[:tokens]
        logp = self.logp[: sum(mask) if mask else tokens]
        return replace(self, answer_ids=self.answer_ids[:tokens], logp=logp, tool_mask=mask)

    def go_on(self, reply_ids: list[int], more: Episode) -> None:
        """Add a tool's reply, and what the policy sampled after it."""
        self.tool_mask = self.tool_mask or [1] * len(self.answer_ids)
        self.tool_mask += [0] * len(reply_ids) + [1] * len(more.answer_ids)
        self.answer_ids += reply_ids + more.answer_ids
        self.logp += more.logp
        self.values += more.values
        self.ended = more.ended


@torch.no_grad()
def sample(
    language_model: LanguageModel,
    prompts: list[list[int]],
    *,
    new_tokens: int,
    temperature: float,
    stops: list[int],
    generator: torch.Generator,
    batch_size: int | None = None,
    critic: Callable[[torch.Tensor], torch.Tensor] | None = None,
    copies: int = 1,
    shared: int = 0,
    among: tuple[Sequence[int], int] | None = None,
    limits: Sequence[int] | None = None,
    static: bool = False,
    advice: str = HELD_OUT,
    when_split: WhenSplit = say_split,
) -> list[Episode]:
    """Answers to each prompt (token ids) from the adapter that is active: `copies` of them, those to one prompt beside
    each other, the prompts in the order given.

    `temperature` 0 takes the likeliest token. `batch_size`: most prompts sampled together. A prompt is read once,
    whatever the number of its answers. `shared`: so many tokens with which all prompts begin alike, fewer than the
    shortest has, are read once for each batch (examples of few-shot prompting). `critic`: hidden states (B, hidden) to
    values (B,), noted beside the tokens. `among`: the prompts' places among so many prompts as the number says; several
    processes that share them draw what one would. `limits`: most tokens of the answers to each prompt, where they
    differ; none is above `new_tokens`. `static`: with a static cache, and on a GPU a compiled step; finished answers
    then stay in the batch, whose size is compiled with it. Where memory does not hold `batch_size`, fewer are sampled
    together, and `when_split` is called; `advice` (models/out_of_memory.py) is for an answer that does not fit even
    alone.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    # One number for each token there may be, drawn before any is: how many are sampled at once and when answers end
    # changes no draw, and policies asked with the same seed differ by what they are, not by their luck.
    places, whole = among or (range(len(prompts)), len(prompts))
    luck_PCG = torch.rand(whole, copies, new_tokens, generator=generator, device=language_model.device)
    luck_PCG = luck_PCG[list(places)]
    limits = limits or [new_tokens] * len(prompts)

    def answers(batch: Sequence[int]) -> dict[int, list[Episode]]:
        few, ends = [prompts[i] for i in batch], [limits[i] for i in batch for _ in range(copies)]
        luck_BG = luck_PCG[batch, :, : max(ends)].flatten(0, 1)
        drawn = _sample_batch(language_model, few, luck_BG, ends, temperature, stops, critic, copies, shared, static)
        return {i: drawn[place * copies : (place + 1) * copies] for place, i in enumerate(batch)}

    parts = run_in_parts(answers, order, lambda i: len(prompts[i]) + limits[i], advice, batch_size, when_split)
    episodes = {i: drawn for part in parts for i, drawn in part.items()}
    return [episode for i in range(len(prompts)) for episode in episodes[i]]


def _sample_batch(
    language_model: LanguageModel,
    prompts: list[list[int]],
    luck_BG: torch.Tensor,
    limits: list[int],
    temperature: float,
    stops: list[int],
    critic: Callable[[torch.Tensor], torch.Tensor] | None,
    copies: int,
    shared: int,
    static: bool,
) -> list[Episode]:
    episodes = [Episode(prompt, [], [], ended=False) for prompt in prompts for _ in range(copies)]
    device = language_model.device
    stops_S, limits_B = torch.tensor(stops, device=device), torch.tensor(limits, device=device)
    rests = [prompt[shared:] for prompt in prompts]
    ids_BT, mask_BT = (t.to(device) for t in padded(rests, language_model.pad_id, side="left"))
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0) + shared
    length = shared + ids_BT.shape[1] + luck_BG.shape[1]
    cache = make_cache(language_model.config, length, static)
    if shared:
        start_1S = torch.tensor([prompts[0][:shared]], device=device)
        ones_1S = torch.ones_like(start_1S)
        with computing(language_model.model):
            language_model.hidden(start_1S, ones_1S, ones_1S.cumsum(1) - 1, cache)
        take_rows(cache, torch.zeros(len(prompts), dtype=torch.long, device=device))
        mask_BT = torch.cat([ones_1S.to(mask_BT).expand(len(prompts), -1), mask_BT], dim=1)
    if static:  # of one shape for all steps: no token sees the places after its own
        mask_BT = functional.pad(mask_BT, (0, length - mask_BT.shape[1]), value=1)
    alive = list(range(len(episodes)))
    # Of each token so far, on the device: what was drawn for the rows alive. Fetched when rows leave and at the end.
    drawn: list[tuple[torch.Tensor, ...]] = []
    # Which rows of the batch still write; a finished one rides along until enough of them can be taken out together.
    writing_B = torch.ones(len(episodes), dtype=torch.bool, device=device)
    for place in range(luck_BG.shape[1]):
        with computing(language_model.model):
            step = language_model.step if static and place else language_model.hidden
            hidden_BTH = step(ids_BT, mask_BT, positions_BT, cache)
            logits_BV = language_model.logits(hidden_BTH[:, -1])
        if place == 0 and copies > 1:
            take_rows(cache, torch.arange(len(prompts), device=device).repeat_interleave(copies))
            hidden_BTH, logits_BV, positions_BT, mask_BT = (
                t.repeat_interleave(copies, 0) for t in (hidden_BTH, logits_BV, positions_BT, mask_BT)
            )
        token_B, logp_B = _draw(logits_BV, temperature, luck_BG[:, place])
        ended_B = torch.isin(token_B, stops_S)
        values = (critic(hidden_BTH[:, -1]),) if critic else ()
        drawn.append((token_B, logp_B, writing_B, ended_B, *values))
        writing_B = writing_B & ~ended_B & (limits_B > place + 1)
        left = int(writing_B.sum())
        if left == 0:
            break
        ids_BT, positions_BT = token_B[:, None], positions_BT[:, -1:] + 1
        if static:
            continue
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], dim=1)
        if left < SHRINK_BELOW * len(alive):
            _write([episodes[row] for row in alive], drawn)
            drawn = []
            kept_K = writing_B.nonzero().squeeze(1)
            take_rows(cache, kept_K)
            ids_BT, positions_BT, mask_BT = ids_BT[kept_K], positions_BT[kept_K], mask_BT[kept_K]
            alive, luck_BG = [alive[row] for row in kept_K.tolist()], luck_BG[kept_K]
            limits_B = limits_B[kept_K]
            writing_B = writing_B[kept_K]
    _write([episodes[row] for row in alive], drawn)
    return episodes


def _write(episodes: list[Episode], drawn: list[tuple[torch.Tensor, ...]]) -> None:
    """Put down what was drawn for these episodes, token after token, each as long as it still wrote."""
    if not drawn:
        return
    tables = [torch.stack(column, dim=1).tolist() for column in zip(*drawn, strict=True)]
    for place, episode in enumerate(episodes):
        tokens, logps, writes, ends, *values = (table[place] for table in tables)
        count = sum(writes)  # a row that has ended does not write again
        episode.answer_ids += tokens[:count]
        episode.logp += logps[:count]
        episode.ended = any(ends[:count])
        for of_critic in values:
            episode.values += of_critic[:count]


def _draw(logits_BV: torch.Tensor, temperature: float, luck_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row and its log-probability. `luck_B`, uniform on [0, 1), picks the token in whose share of the
    cumulated probabilities it falls: one random number a token, not one for each entry of the vocabulary."""
    likeliest_B1, token_B1 = logits_BV.max(-1, keepdim=True)
    likeliest_B1 = likeliest_B1.float()
    # One table beside the logits, worked on in place: at a vocabulary's width passes over memory are what costs.
    mass_BV = logits_BV.to(torch.float32, copy=True).sub_(likeliest_B1)
    if temperature not in (0, 1):
        mass_BV.div_(temperature)
    torch.cumsum(mass_BV.exp_(), -1, out=mass_BV)
    if temperature:
        token_B1 = torch.searchsorted(mass_BV, luck_B[:, None] * mass_BV[:, -1:], right=True)
        token_B1 = token_B1.clamp(max=mass_BV.shape[1] - 1)  # where rounding has made the product the whole mass
    above_B1 = (logits_BV.gather(1, token_B1).float() - likeliest_B1) / (temperature or 1.0)
    return token_B1.squeeze(1), (above_B1 - mass_BV[:, -1:].log()).squeeze(1)
