"""A judge votes before people do: a reward model of the run, or a model behind an endpoint on this machine.

Its votes are lines like those of people, marked as a judge's. People check a part of its pairs, blind.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from itertools import islice

from pipeline.data.votes import Choice, Vote, append
from pipeline.disk.atomic import digest
from pipeline.evaluate import judge as judges
from pipeline.evaluate.judge import AT_ONCE, Judge
from pipeline.label.desk import Desk
from pipeline.label.drawing import Drawer, Pair
from pipeline.language.say import say

FIRST = 8
"""Replies after which a judge is rejected if most are no verdict."""
TOLD_EVERY = 25


def annotator_of(judge: Judge | str) -> str:
    """The name under which a judge votes, and that of its file. No person's name holds a dot, so none can be its."""
    name = judge.model if isinstance(judge, Judge) else judge
    return "judge." + (re.sub(r"[^\w-]+", "-", name).strip("-")[:60] or digest(name))


def judge_pairs(desk: Desk, judge: Judge | str, labels: int, check: float) -> int:
    """Let a judge vote until it has given `labels` votes or no prompt is left, each on the disk at once. It passes over
    pairs that it has voted on before. Gives how many votes it has given in all.

    judge: an endpoint, which is asked in both orders, a verdict that does not stay being a tie; or the reward stage by
    which the desk's drawer scores answers. check: the share of the pairs that people are to see.

    Raises UserError where the judge does not answer, or where most of its replies are no verdict.
    """
    name = annotator_of(judge)
    done = {vote.pair for vote in desk.votes(name)}
    new = (pair for pair in _drawn(desk.drawer) if pair.name not in done)
    asked, unread, without = 0, list[str](), 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while pairs := list(islice(new, min(AT_ONCE, labels - len(done)))):
            for pair, (choice, seconds, replies) in zip(pairs, pool.map(partial(_ask, judge), pairs), strict=True):
                asked += len(replies)
                missing = [reply for reply in replies if judges.verdict(reply) is None]
                unread += missing
                if asked >= FIRST and 2 * len(unread) > asked:
                    raise judges.reject(name, unread, asked)
                if missing:
                    without += 1
                    continue
                vote = Vote(
                    id=digest([name, pair.name]),
                    time=datetime.now(UTC),
                    annotator=name,
                    pair=pair.name,
                    prompt=pair.prompt,
                    candidates=pair.candidates,
                    shown=[0, 1],
                    choice=choice,
                    seconds=seconds,
                    choose=desk.drawer.choose,
                    share=int(digest(["check", pair.name]), 16) < check * 16**16,
                    judge=True,
                )
                append(desk.folder / f"{name}.jsonl", vote)
                done.add(pair.name)
                if len(done) % TOLD_EVERY == 0:
                    print(say("{n} of {labels} votes", n=len(done), labels=labels), flush=True)
    if without:
        print(say("{n} pairs have no vote: a reply was no verdict", n=without), flush=True)
    return len(done)


def _drawn(drawer: Drawer) -> Iterator[Pair]:
    """Pairs in their order, more of them as they are asked for."""
    at = 0
    while True:
        while at == len(drawer.pairs):
            if drawer.finished:
                return
            drawer.draw_block()
        yield drawer.pairs[at]
        at += 1


def _ask(judge: Judge | str, pair: Pair) -> tuple[Choice, float, list[str]]:
    """Which answer a judge finds better, or a tie; the seconds it took; and its replies, where it gives any."""
    begun, replies = time.monotonic(), list[str]()
    if isinstance(judge, Judge):
        points, replies = judge.points(judges.question(pair.prompt), *(one.text for one in pair.candidates))
    else:
        assert pair.scores is not None, "the drawer of a reward model's votes scores by it"
        first, second = pair.scores
        points = 0.5 if first == second else float(first > second)
    choice: Choice = "tie" if points == 0.5 else 1 - int(points)
    return choice, time.monotonic() - begun, replies
