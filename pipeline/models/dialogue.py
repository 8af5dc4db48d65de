"""Answers to rows, turn by turn: where a row has an environment, the tools that the model calls are run, and it goes on
after their replies.

A reply is put in as the chat template renders it, behind the very tokens that were sampled; nothing is rendered anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data import render
from pipeline.data.contracts import Row
from pipeline.data.tokens import (
    STAND_IN,
    Messages,
    Unrenderable,
    apply_template,
    closing_marks,
    tokenize,
    without_marks,
)
from pipeline.errors import UserError
from pipeline.models import environments
from pipeline.models.environments import TOOL_SECONDS, Call
from pipeline.models.sampling import Episode, sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from pipeline.models.forward import LanguageModel


@dataclass
class Told:
    """An answer to a row's prompt."""

    row: Row
    """Its prompt is what was asked, with what the environment has put after it."""
    episode: Episode
    text: str
    """What the model said last, without the end-of-turn token."""
    world: Any = None
    """The environment's instance."""
    turns: Messages = field(default_factory=list)
    """With an environment: what the model and the tools said, turn by turn."""
    calls: int = 0
    """Of tools."""
    failures: int = 0
    """Those of them that could not be read, named no tool, or made it raise an error."""

    @property
    def completion(self) -> Any:
        """As TRL gives it to reward functions: a text after a text, else messages."""
        alone = self.text if isinstance(self.row["prompt"], str) else [{"role": "assistant", "content": self.text}]
        return self.turns or alone


@torch.no_grad()
def answer(
    language_model: LanguageModel,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    *,
    new_tokens: int,
    generator: torch.Generator,
    copies: int = 1,
    among: tuple[Sequence[int], int] | None = None,
    limits: list[int] | None = None,
    batch_size: int | None = None,
    alike: bool = False,
    iterations: int | None = None,
    seconds: float = TOOL_SECONDS,
    **options: Any,
) -> list[Told]:
    """Answers to each row's prompt, as `sample` gives them, which takes `options` and draws equally here and in several
    processes. `alike`: what all prompts begin with is read once for each batch.

    With an environment `new_tokens` holds the whole answer, the tools' replies included, and tools are run in at most
    `iterations` turns, each for at most `seconds`. An answer that would have gone on has not `ended`.
    """
    begun = [_begin(row, copies, seconds) for row in rows]
    asked, worlds = [row for row, _ in begun], [world for _, some in begun for world in some]
    acting = any(world is not None for world in worlds)
    prompts = [render.prompt(tokenizer, row) for row in asked]
    if acting:
        _refuse_long(asked, prompts, new_tokens, language_model.config)
    episodes = sample(
        language_model, prompts, new_tokens=new_tokens, generator=generator, copies=copies, among=among,
        shared=common_start(prompts) if alike or acting else 0, limits=limits, batch_size=batch_size, **options,
    )  # fmt: skip
    told = [Told(asked[i // copies], episode, "", worlds[i]) for i, episode in enumerate(episodes)]
    for one in told:
        _take_turn(tokenizer, one, one.episode)
    places, whole = among or (range(len(rows)), len(rows))
    places = [place * copies + copy for place in places for copy in range(copies)]
    ends = [limit for limit in limits or [new_tokens] * len(rows) for _ in range(copies)]
    turns = 0
    while turns != iterations:
        replies = [_use_tools(tokenizer, one, end, seconds) for one, end in zip(told, ends, strict=True)]
        some = [i for i, reply_ids in enumerate(replies) if reply_ids]
        if not some:
            break
        contexts = [told[i].episode.prompt_ids + told[i].episode.answer_ids + replies[i] for i in some]
        more = sample(
            language_model, contexts, new_tokens=new_tokens, generator=generator,
            among=([places[i] for i in some], whole * copies), shared=common_start(contexts),
            limits=[ends[i] - len(told[i].episode.answer_ids) - len(replies[i]) for i in some],
            batch_size=batch_size and batch_size * copies, **options,
        )  # fmt: skip
        for i, episode in zip(some, more, strict=True):
            told[i].episode.go_on(replies[i], episode)
            _take_turn(tokenizer, told[i], episode)
        turns += 1
    for one in told:
        one.episode.ended &= not _asks_a_tool(one)
    return told


def _begin(row: Row, copies: int, seconds: float) -> tuple[Row, list[Any]]:
    """The row with what its environment puts after the prompt, and an instance for each answer."""
    if not row.get("environment"):
        return row, [None] * copies
    begun = [environments.begin(row, seconds) for _ in range(copies)]
    texts = [text for _, text in begun]
    if len(set(texts)) > 1:
        raise UserError(
            f"the environment {row['environment']} began differently for two answers to the prompt at "
            f"{row['_place']}. Make what reset returns follow from the row: answers to one prompt are compared, and a "
            "run that goes on must ask the same again."
        )
    return {**row, "prompt": environments.put_after(row["prompt"], texts[0])}, [world for world, _ in begun]


def _refuse_long(rows: Sequence[Row], prompts: list[list[int]], new_tokens: int, config: Any) -> None:
    window = getattr(config, "max_position_embeddings", None) or 1 << 62
    for row, ids in zip(rows, prompts, strict=True):
        if row.get("environment") and len(ids) + new_tokens > window:
            raise UserError(
                f"{row['_place']}: the prompt has {len(ids)} tokens with what the environment {row['environment']} "
                f"puts after it; the base's window of {window} leaves no room for an answer of {new_tokens}"
            )


def common_start(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with alike, fewer than the shortest has."""
    return min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)


def decode(tokenizer: Tokenizer, episode: Episode, row: Row) -> str:
    """The answer as text, without its end-of-turn token. White space around it belongs to it where the prompt is a text
    that it goes on from; a chat template drops it."""
    ids = episode.answer_ids[:-1] if episode.ended else episode.answer_ids
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return text if isinstance(row["prompt"], str) else text.strip()


def _take_turn(tokenizer: Tokenizer, one: Told, turn: Episode) -> None:
    """Note what the model said in its last turn."""
    one.text = decode(tokenizer, turn, one.row)
    if one.world is not None:
        one.turns.append(environments.as_message(one.text))


def _asks_a_tool(one: Told) -> bool:
    return one.world is not None and one.episode.ended and bool(environments.parse_calls(one.text))


def _use_tools(tokenizer: Tokenizer, one: Told, limit: int, seconds: float) -> list[int]:
    """What is put behind a turn that calls tools, which are run here. Nothing where it calls none, or where the answer
    has no room left: then it has not ended by itself."""
    if not _asks_a_tool(one):
        return []
    replies = []
    for call in environments.parse_calls(one.text):
        said, failed = environments.call_tool(one.world, call, one.row, seconds)
        one.calls, one.failures = one.calls + 1, one.failures + failed
        # Nobody but the model ends its turns: a reply cannot hold a token that would.
        name, content = (without_marks(tokenizer, text) for text in (call.name or "unknown", said))
        replies.append({"role": "tool", "name": name, "content": content})
    reply_ids = tokenize(tokenizer, render_replies(tokenizer, one.row, replies))[0]
    if len(one.episode.answer_ids) + len(reply_ids) >= limit:
        one.episode.ended = False
        return []
    one.turns += replies
    return reply_ids


def render_replies(tokenizer: Tokenizer, row: Row, replies: Messages) -> str:
    """What the template puts between the end of a turn that calls tools and the model's next words."""
    calling = [{"role": "user", "content": "q"}, _calling(replies[0]["name"], {})]
    before = apply_template(tokenizer, calling, row).rstrip()
    whole = apply_template(tokenizer, [*calling, *replies], row, ask=True)
    if not whole.startswith(before):
        raise Unrenderable("the chat template renders a call of a tool differently once the tool has replied")
    return whole[len(before) :]


def check_template(tokenizer: Tokenizer, reference: str) -> None:
    """Raises UserError for a chat template under which a rollout with tools would not be what is trained and served: it
    must tell the model of its tools, write calls as they are read, and leave earlier turns as they were."""
    environment = environments.load(reference)
    row, names = {"tools": environment.tools}, [tool["function"]["name"] for tool in environment.tools]
    arguments = {"argument": STAND_IN}
    reply = {"role": "tool", "name": names[0], "content": STAND_IN}
    turns: Messages = [{"role": "user", "content": "q"}]
    turns += [_calling(names[0], arguments), reply] * 2 + [{"role": "assistant", "content": "It is done."}]
    try:
        prompt, whole = apply_template(tokenizer, turns[:1], row, ask=True), apply_template(tokenizer, turns, row)
        for name in names:
            if name not in prompt:
                raise Unrenderable(f"it does not tell the model of the tool '{name}'")
        for count in (2, 4):
            before = apply_template(tokenizer, turns[: count - 1], row, ask=True)
            through = apply_template(tokenizer, turns[:count], row).rstrip()
            after = apply_template(tokenizer, turns[: count + 1], row, ask=True)
            said = through[len(before) :]
            if not through.endswith(tuple(closing_marks(tokenizer))):
                raise Unrenderable("it closes a turn that calls a tool without a token that the model could stop at")
            if environments.parse_calls(said) != [Call(names[0], arguments)]:
                raise Unrenderable(
                    'it does not write a call as <tool_call>{"name": ..., "arguments": {...}}</tool_call>, the form '
                    "that is read here"
                )
            apart = not through.startswith(before) or not whole.startswith(through) or not after.startswith(through)
            if apart or after[len(through) :] != render_replies(tokenizer, row, [reply]):
                raise Unrenderable(
                    "it renders earlier turns differently once later ones follow, so what is sampled turn by turn "
                    "would not be what it makes of the whole dialogue"
                )
            if STAND_IN not in after[len(through) :]:
                raise Unrenderable("it leaves out what a tool replies")
    except Unrenderable as error:
        raise UserError(
            f"model.chat_template: it cannot be used with the environment {reference}: {error}. Name another one, for "
            "example recipes/templates/chatml-tools.jinja"
        ) from error


def _calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
