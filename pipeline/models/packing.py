"""Rows of a batch end to end inside the model, without padding; what several rows begin with is computed once.

The trunk of a packed model takes a padded batch (B, T) and gives its hidden states (B, T, hidden), as ever. In between
its layers see one row of N real tokens, in segments: each row is one, or, where rows begin alike (the two answers of a
comparison, a group of answers to one prompt, dialogues under one system message), their shared beginning is a segment
and each rest another, which also attends to that beginning. Positions restart with every row. What comes before and
after the trunk, losses and heads, does not know of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.models import varlen
from pipeline.models.computed import Computed
from pipeline.models.spec import SEGMENTS
from pipeline.models.varlen import Segment

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Tensor = torch.Tensor
NAME = SEGMENTS
"""Of the attention by segments, among transformers' attention functions."""
ATTENDING = {"full_attention", "sliding_attention"}
SLOW_IN_BFLOAT16 = not torch.cpu._is_amx_tile_supported()
"""Without AMX torch's fused attention of short rows is many times slower on a CPU in bfloat16 than in float32."""
SHARED_AT_LEAST = 8
"""Tokens that rows have to begin with alike for these to be computed once."""


@dataclass(frozen=True)
class Pack:
    """A padded batch without its padding."""

    ids_1N: Tensor
    positions_1N: Tensor
    segments: list[Segment]
    places_BT: Tensor
    """Where each token of the batch lies in the packed row; 0 for padding."""
    real: int
    """Tokens of the batch without its padding. Where beginnings are shared the packed row has fewer."""


def can_pack(config: PretrainedConfig, auto_class: Any) -> bool:
    """Whether a model's layers mix tokens by attention alone, through transformers' attention functions: a convolution
    or a recurrent layer would run over the ends of rows. Attention sinks need a function of their own."""
    if type(config) not in auto_class._model_mapping:
        return False
    model_class = auto_class._model_mapping[type(config)]
    only_attend = set(getattr(config, "layer_types", None) or ATTENDING) <= ATTENDING
    stateful = getattr(model_class, "_is_stateful", False) or getattr(config, "is_encoder_decoder", False)
    if not only_attend or stateful or not getattr(model_class, "_supports_attention_backend", False):
        return False
    return bool(model_class._supports_sdpa or getattr(config, "attn_logit_softcapping", None))


def pack_inside(model: PreTrainedModel) -> None:
    """Make the trunk of a model, loaded with attention by segments, compute its batches packed."""
    trunk = getattr(model, model.base_model_prefix)
    trunk.computed = Computed()
    trunk.forward = MethodType(_packed_forward, trunk)


def _packed_forward(
    trunk: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = None,
    **more: Any,
) -> Any:
    whole = type(trunk).forward
    plain = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    sampled = past_key_values is not None or (use_cache and not trunk.training)
    # Only the last states are given back in their places.
    further = ("output_hidden_states", "output_attentions", "output_router_logits")
    watched = any(more.get(name, getattr(trunk.config, name, False)) for name in further)
    pack = None
    if input_ids is not None and not sampled and not watched:
        share = not (trunk.training and _drops_out(trunk))
        pack = pack_rows(input_ids, attention_mask, position_ids, share)
    if input_ids is not None and not sampled:
        whole_batch = input_ids.numel()
        real, computed = (pack.real, pack.ids_1N.numel()) if pack else (whole_batch, whole_batch)
        trunk.computed.add(real, computed, padded=whole_batch)
    if pack is None:
        return whole(trunk, **plain, past_key_values=past_key_values, use_cache=use_cache, **more)
    # A mask of four dimensions is passed on as it is; attention by segments does not read it.
    device = pack.ids_1N.device
    unread = torch.empty((1, 1, 1, 1), device=device)
    # Gemma 4 would leave places out of its last layers that no logits are asked of.
    for name in (
        "logits_to_keep",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "cache_position",
    ):
        more.pop(name, None)
    out = whole(
        trunk,
        input_ids=pack.ids_1N,
        attention_mask=unread,
        position_ids=pack.positions_1N,
        use_cache=False,
        segments=varlen.bounds_of(pack.segments, device) if device.type == varlen.DEVICE else pack.segments,
        **more,
    )
    # In the trunk's own class: what is around it asks a mixture of experts, or a model that also sees, for more.
    out.last_hidden_state = out.last_hidden_state[0][pack.places_BT]
    return out


def _drops_out(trunk: torch.nn.Module) -> bool:
    """Whether each row draws what it leaves out: what is shared would be drawn once for several."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in trunk.modules())


def pack_rows(ids_BT: Tensor, mask_BT: Tensor | None, positions_BT: Tensor | None, share: bool) -> Pack | None:
    """The real tokens of a batch end to end; None where it has nothing to gain. On a GPU it always has: no mask.

    mask_BT: 1 on real tokens, which may lie right or left; None: all are real, and where `positions_BT` of a single row
    restart, it holds several.  share: compute once what rows begin with alike.
    """
    if mask_BT is None:
        return _pack_of_packed(ids_BT, positions_BT)
    if mask_BT.dim() != 2:
        return None
    device, (count, width) = ids_BT.device, ids_BT.shape
    mask, ids = mask_BT.tolist(), ids_BT.tolist()
    rows = [[token for token, real in zip(ids[b], mask[b], strict=True) if real] for b in range(count)]
    at = [mask[b].index(1) if rows[b] else 0 for b in range(count)]
    if any(sum(mask[b][at[b] : at[b] + len(rows[b])]) != len(rows[b]) for b in range(count)):
        return None  # a hole among the real tokens
    groups = _groups(rows) if share else [([b], 0) for b in range(count)]
    full = all(len(row) == width for row in rows) and not any(length for _, length in groups)
    if full and device.type != varlen.DEVICE:
        return None
    flat, positions, segments = list[int](), list[int](), list[Segment]()
    places = [[0] * width for _ in range(count)]
    for members, length in groups:
        begin = len(flat)
        if length:
            flat += rows[members[0]][:length]
            positions += range(length)
            segments.append(Segment(begin, begin + length))
        for b in members:
            start, rest = len(flat), rows[b][length:]
            flat += rest
            positions += range(length, length + len(rest))
            if rest:
                segments.append(Segment(start, len(flat), (begin, begin + length) if length else (0, 0)))
            own = [*range(begin, begin + length), *range(start, len(flat))]
            places[b][at[b] : at[b] + len(own)] = own

    def tensor(values: Any) -> Tensor:
        return torch.tensor(values, device=device)

    real = sum(map(len, rows))
    return Pack(tensor(flat)[None], tensor(positions)[None], segments, tensor(places), real)


def _pack_of_packed(ids_BT: Tensor, positions_BT: Tensor | None) -> Pack | None:
    """Of a row that a collator has packed already: its segments, where there are several."""
    if positions_BT is None or len(ids_BT) > 1 or positions_BT.shape != ids_BT.shape:
        return None
    starts = (positions_BT[0] == 0).nonzero()[:, 0].tolist()
    if starts[:1] != [0] or (len(starts) < 2 and ids_BT.device.type != varlen.DEVICE):
        return None
    bounds = zip(starts, [*starts[1:], ids_BT.shape[1]], strict=True)
    places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
    return Pack(ids_BT, positions_BT, [Segment(start, stop) for start, stop in bounds], places_BT, ids_BT.numel())


def _groups(rows: list[list[int]]) -> list[tuple[list[int], int]]:
    """Rows that begin alike, each group with how many tokens all its members share; 0 for a row by itself.

    In order of their tokens those with most in common are neighbours. A row joins the group before it where that saves
    more tokens than it costs the others, whose shared beginning may become shorter.
    """
    groups: list[tuple[list[int], int]] = []
    for b in sorted(range(len(rows)), key=rows.__getitem__):
        if groups and rows[b]:
            members, length = groups[-1]
            known = rows[members[0]][: length or None]
            shared = _shared(known, rows[b])
            if shared >= SHARED_AT_LEAST and shared * len(members) > length * (len(members) - 1):
                groups[-1] = ([*members, b], shared)
                continue
        groups.append(([b], 0))
    return groups


def _shared(first: list[int], second: list[int]) -> int:
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def attend_by_segments(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: list[Segment] | varlen.Bounds | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention (1, heads, N, D) within each segment and to what comes before it: (1, N, heads, D). Without
    segments, which a batch for sampling does not have, over rows (B, heads, T, D) under their mask."""
    if segments is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    if isinstance(segments, varlen.Bounds):
        return varlen.attend(query, key, value, segments, scaling, sliding_window), None
    grouped = query.shape[1] != key.shape[1]
    if softcap is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if segments is None:
        out = _capped(query, key, value, attention_mask, scaling, softcap or 0.0)
        return out.transpose(1, 2).contiguous(), None
    dtype = query.dtype
    if SLOW_IN_BFLOAT16 and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    # Split at once and not sliced one by one: the way back of a slice passes over the whole row.
    lengths = [segment.stop - segment.start for segment in segments]
    own = zip(segments, *(torch.split(states, lengths, 2) for states in (query, key, value)), strict=True)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    parts = []
    for segment, states, keys, values in own:
        seen[segment.start] = keys, values
        first, last = segment.before
        before, length = last - first, segment.stop - segment.start
        if before:
            shared_keys, shared_values = seen[first]
            keys, values = torch.cat([shared_keys, keys], 2), torch.cat([shared_values, values], 2)
        far = sliding_window is not None and before + length > sliding_window
        mask_QK = _mask(length, before, sliding_window if far else None, query.device) if before or far else None
        if softcap is not None:
            parts.append(_capped(states, keys, values, mask_QK, scaling, softcap))
            continue
        with torch.autocast(query.device.type, enabled=False):
            fused = functional.scaled_dot_product_attention
            causal = mask_QK is None
            parts.append(fused(states, keys, values, mask_QK, dropout, causal, scale=scaling, enable_gqa=grouped))
    return torch.cat(parts, 2).to(dtype).transpose(1, 2).contiguous(), None


def _mask(length: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `before + length` keys each of the last `length` places reads (Q, K)."""
    places_Q = torch.arange(before, before + length, device=device)[:, None]
    places_K = torch.arange(before + length, device=device)[None]
    mask_QK = places_K <= places_Q
    return mask_QK if window is None else mask_QK & (places_K > places_Q - window)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, mask_QK: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    """Attention whose scores are held within the cap (Gemma 2, arXiv 2408.00118), which no fused kernel computes."""
    scores_QK = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    scores_QK = torch.tanh(scores_QK / cap) * cap
    if mask_QK is None:
        mask_QK = _mask(query.shape[2], key.shape[2] - query.shape[2], None, query.device)
    weights_QK = (
        scores_QK.masked_fill(~mask_QK, torch.finfo(scores_QK.dtype).min)
        .softmax(-1, dtype=torch.float32)
        .to(query.dtype)
    )
    return weights_QK @ value


AttentionInterface.register(NAME, attend_by_segments)
AttentionMaskInterface.register(NAME, sdpa_mask)
