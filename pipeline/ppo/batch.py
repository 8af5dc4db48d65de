"""A batch on its way: prompts -> Rollout -> Scored -> Learnt. Each step is made whole and never changed.

Of a pack: B episodes, T tokens of its longest prompt with answer, G tokens of its longest answer, N tokens of all its
answers, row after row. Values on (B, G) are 0 where an answer has no token. What tools reply is in T and neither in G
nor in N: it is seen and not learnt from, and after the last token before a reply comes the first one after it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Self, TypeVar

import torch
from torch import Tensor

from pipeline.data.contracts import Row
from pipeline.data.render import padded
from pipeline.models.dialogue import Told
from pipeline.models.out_of_memory import EPISODE, run_in_parts
from pipeline.models.sampling import Episode

Item = TypeVar("Item")


@dataclass(frozen=True)
class Rollout:
    """A process's share of a step's prompts, answered by the policy."""

    told: list[Told]

    @property
    def rows(self) -> list[Row]:
        """The prompts, one for each episode."""
        return [one.row for one in self.told]

    @property
    def episodes(self) -> list[Episode]:
        return [one.episode for one in self.told]

    @property
    def texts(self) -> list[str]:
        """The answers as text, without their end-of-turn tokens; where tools are called, what is said last."""
        return [one.text for one in self.told]


@dataclass(frozen=True)
class Pack:
    """Episodes of like length that pass through the model together, the same ones at scoring and in every epoch.

    Places are made on the host, so that nothing on the device depends on data.
    """

    rows: list[int]
    """(B) The episodes' places in the rollout."""
    ids_BT: Tensor
    """(B, T) Prompts with their answers, padded on the right."""
    mask_BT: Tensor
    """(B, T) 1 where ids_BT holds a token."""
    mask_BG: Tensor
    """(B, G) 1.0 where an answer has a token."""
    token_N: Tensor
    """(N) The answers' tokens, those that the policy sampled."""
    row_N: Tensor
    """(N) The row of each, among B."""
    column_N: Tensor
    """(N) The place of each in its answer, among G."""
    state_N: Tensor
    """(N) The place from which each is predicted, among T."""

    def part(self, start: int, stop: int) -> Pack:
        """Rows from `start` to before `stop`, under the padding that they have."""
        if (start, stop) == (0, len(self.rows)):
            return self
        chosen_N, some = (self.row_N >= start) & (self.row_N < stop), slice(start, stop)
        places = (self.token_N[chosen_N], self.row_N[chosen_N] - start, self.column_N[chosen_N], self.state_N[chosen_N])
        return Pack(self.rows[some], self.ids_BT[some], self.mask_BT[some], self.mask_BG[some], *places)

    def lay_out(self, values_N: Tensor) -> Tensor:
        """(B, G) One value for each answer token (N), each at its place."""
        return torch.zeros_like(self.mask_BG).index_put((self.row_N, self.column_N), values_N.float())

    def lay_out_lists(self, values: list[list[float]]) -> Tensor:
        """(B, G) A value for each token of each episode of the rollout, those of this pack."""
        return self.lay_out(torch.tensor([value for row in self.rows for value in values[row]]).to(self.ids_BT.device))


@dataclass(frozen=True)
class Scored:
    """A pack with what its answers are worth, and what policy, reference and critic say of them."""

    pack: Pack
    scores_B: Tensor
    """(B) What each answer is paid: normalised, bounded, less what a cut answer costs."""
    logp_BG: Tensor
    """(B, G) Log-probabilities of its tokens under the policy that wrote it, in nats."""
    ref_logp_BG: Tensor | None
    """(B, G) The same under the reference; None where nothing depends on it."""
    values_BG: Tensor | None
    """(B, G) The critic's values of the states before the tokens; None where there is no critic."""


@dataclass(frozen=True)
class Learnt:
    """What an update learns from."""

    pack: Pack
    old_logp_BG: Tensor | None
    """(B, G) Log-probabilities under the policy that wrote the answers. None before the first pass of an update that is
    made by that very policy: then they are what this pass gives."""
    importance_BG: Tensor | None = field(default=None, kw_only=True)
    """(B, G) What corrects each token's loss for having been sampled by an engine (ppo/importance.py)."""

    def part(self, start: int, stop: int) -> Self:
        """Rows from `start` to before `stop`, under the padding that they have."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "pack"}
        some = {name: None if tensor is None else tensor[start:stop] for name, tensor in tensors.items()}
        return replace(self, pack=self.pack.part(start, stop), **some)


@dataclass(frozen=True)
class Advantaged(Learnt):
    """With a critic: an advantage for each token."""

    old_values_BG: Tensor
    """(B, G) The critic's values when the answers were scored."""
    advantages_BG: Tensor
    returns_BG: Tensor
    """(B, G) What the critic should have said."""


@dataclass(frozen=True)
class Grouped(Learnt):
    """Without a critic: an advantage for each answer, within its group."""

    ref_logp_BG: Tensor | None
    """(B, G) Log-probabilities under the reference; None without a KL penalty in the loss."""
    advantages_B: Tensor
    weights_BG: Tensor
    """(B, G) What each token's loss counts for."""


def pack_episodes(
    episodes: list[Episode], at_once: int, pad_id: int, device: torch.device, together: int = 1
) -> list[Pack]:
    """Every episode in packs of `at_once`, those of like length together. `together`: so many that are beside each
    other stay beside each other, as answers to one prompt, which a packed model reads once for all of them."""
    longest = [max(map(len, episodes[i - i % together : i - i % together + together])) for i in range(len(episodes))]
    order = sorted(range(len(episodes)), key=lambda i: (longest[i], i // together))
    return [_pack(order[s : s + at_once], episodes, pad_id, device) for s in range(0, len(order), at_once)]


def _pack(rows: list[int], episodes: list[Episode], pad_id: int, device: torch.device) -> Pack:
    ids_BT, mask_BT = padded([episodes[i].prompt_ids + episodes[i].answer_ids for i in rows], pad_id)
    _, mask_BG = padded([episodes[i].sampled for i in rows], pad_id)
    places = [
        (episodes[i].answer_ids[at], place, column, len(episodes[i].prompt_ids) + at - 1)
        for place, i in enumerate(rows)
        for column, at in enumerate(episodes[i].sampled)
    ]
    tensors = (ids_BT, mask_BT, mask_BG.float(), *torch.tensor(places).T.contiguous())
    return Pack(rows, *(tensor.to(device) for tensor in tensors))


def take_in_turn(items: Sequence[Item], first: int, count: int, seed: str) -> list[Item]:
    """So many of an endless row of shuffled epochs over the items, from its place `first` on."""
    places = (divmod(place, len(items)) for place in range(first, first + count))
    return [items[_shuffled(len(items), f"{seed}/{epoch}")[index]] for epoch, index in places]


@lru_cache(maxsize=8)
def _shuffled(count: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def run_forward(forward: Callable[[Pack], list[Tensor]], pack: Pack) -> list[Tensor]:
    """`forward` of a pack; where memory does not hold it, of parts of it, laid one below the other."""
    parts = run_in_parts(
        lambda rows: forward(pack.part(rows[0], rows[-1] + 1)),
        range(len(pack.rows)),
        lambda _: pack.ids_BT.shape[1],
        EPISODE,
    )
    return parts[0] if len(parts) == 1 else [torch.cat(columns) for columns in zip(*parts, strict=True)]
