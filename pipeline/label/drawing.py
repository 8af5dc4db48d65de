"""Answers to compare, drawn from the stages of a run ahead of the people who read them, and kept on disk.

`labels/.drawn` holds one line for each block of prompts whose answers were drawn, with the adapters that gave them. A
server that is started again shows the same answers. What another adapter gave is not shown again: it is drawn anew.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.data.contracts import Row
from pipeline.data.prompts import prompt_key
from pipeline.data.votes import Candidate, Choose, pair_of
from pipeline.disk.atomic import digest
from pipeline.errors import UserError
from pipeline.label import choosing
from pipeline.language.say import say

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

SPARE = 2
"""Answers drawn beyond those wanted, because some will be alike."""
FIRST, BLOCK, POOL = 2, 8, 64
"""Prompts answered together: the first ones, so that people can begin soon, and the others; and those from which the
pairs worth showing first are chosen."""
AHEAD = 24
"""Pairs that lie ready beyond the furthest person, so that nobody waits for the model."""


@dataclass(frozen=True)
class Pair:
    """Two or more answers to one prompt."""

    prompt: str | list[dict[str, Any]]
    candidates: list[Candidate]
    scores: list[float] | None = None
    """The reward model's, where the run has one: told after a vote, never before."""
    gold: int | None = None
    """Which answer is the better one, where that is known."""

    @cached_property
    def name(self) -> str:
        return pair_of(self.prompt, [candidate.text for candidate in self.candidates])

    @cached_property
    def asks(self) -> str:
        return digest(prompt_key({"prompt": self.prompt}))


@dataclass(frozen=True)
class Policy:
    """Who gives one of the answers."""

    stage: str
    adapter: str
    temperature: float
    best_of: int = 1
    """Of so many draws the one that the reward model scores highest."""


@dataclass
class Drawer:
    """Draws pairs in a thread of its own, block after block."""

    file: Path
    policies: list[Policy]
    """One for each answer beside the others; in an arena those of whom two answer each prompt."""
    prompts: Sequence[Row]
    seed: int
    new_tokens: int
    choose: Choose
    load: Callable[[], Bench]
    reward: str = ""
    """The reward stage that scores the answers; empty where the run has none."""
    judge: str = ""
    """The sha256 of its adapter, where it decides what is shown, or votes."""
    arena: bool = False
    pairs: list[Pair] = field(default_factory=list)
    """In the order in which people see them. Only ever added to."""
    told: list[str] = field(default_factory=list)
    failed: str = ""
    bench: Bench | None = None

    def __post_init__(self) -> None:
        policies = [list(astuple(policy)) for policy in self.policies]
        asked = [row["prompt"] for row in self.prompts]
        self._key = digest([policies, self.seed, self.new_tokens, self.choose, self.reward, self.judge, asked])
        self._adapters = {policy.stage: policy.adapter for policy in self.policies}
        if self.judge:
            self._adapters[self.reward] = self.judge
        self._drawn = 0
        self._wanted = threading.Event()
        self._needed = AHEAD
        self._thread: threading.Thread | None = None
        self._read()

    @property
    def finished(self) -> bool:
        """Every prompt has been answered."""
        return self._drawn >= len(self.prompts)

    @property
    def drawing(self) -> bool:
        """Its thread has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def need(self, pairs: int) -> None:
        """So many pairs are to lie ready."""
        self._needed = max(self._needed, pairs)
        self._wanted.set()

    def start(self) -> None:
        self._thread = threading.Thread(target=self._draw, name="drawing", daemon=True)
        self._thread.start()

    def _draw(self) -> None:
        try:
            while not self.finished:
                if len(self.pairs) >= self._needed:
                    self._wanted.wait()
                    self._wanted.clear()
                    continue
                self.draw_block()
        except Exception as error:  # the page tells it: a thread that dies in silence leaves people waiting
            self.failed = str(error) or type(error).__name__
            if not isinstance(error, UserError):
                raise

    def draw_block(self) -> None:
        """Draw the pairs of the next prompts, which wait for it."""
        if self.bench is None:
            self.bench = self.load()
        self.keep(self._block_of_pairs(self.bench))

    def _block_of_pairs(self, bench: Bench) -> list[Pair | None]:
        """The next block: for each prompt its pair, or None where the answers drawn were all alike."""
        size = POOL if self.choose != "random" else BLOCK if self._drawn else FIRST
        end = min(self._drawn + size, len(self.prompts))
        rows = [self.prompts[number] for number in range(self._drawn, end)]
        with bench.ready():
            pairs: list[Pair | None] = []
            for start in range(0, len(rows), BLOCK):
                pairs += self._answer(bench, rows[start : start + BLOCK], self._drawn + start)
            found = [pair for pair in pairs if pair is not None]
            if self.reward and found:
                found = self._score(bench, found)
        return [*found, *[None] * (len(rows) - len(found))]

    def _answer(self, bench: Bench, rows: list[Row], first: int) -> list[Pair | None]:
        import torch

        from pipeline.data import render
        from pipeline.data.tokens import Unrenderable, stop_ids, without_marks
        from pipeline.models import dialogue, sampling

        asked: list[tuple[Row, list[int], list[Policy]]] = []
        for number, row in enumerate(rows, first):
            try:
                asked.append((row, render.prompt(bench.tokenizer, row), self._who_answers(number)))
            except Unrenderable as error:
                self.told.append(f"{row.get('_place', '')}: {error}")
        answers: list[list[Candidate]] = [[] for _ in asked]
        for place, policy in enumerate(dict.fromkeys(self.policies)):
            seed = (self.seed + 7919 * first + place) % 2**32
            wanted = self.policies.count(policy)
            # In an arena each gives the first answer that it draws: to draw on until the two differ would have the
            # second one give answers that it rarely gives.
            copies = wanted * policy.best_of + SPARE if policy.temperature and not self.arena else 1
            mine = [number for number, (_, _, who) in enumerate(asked) if policy in who]
            if not mine:
                continue
            with bench.sampling_as(policy.stage):
                episodes = sampling.sample(
                    bench.actors,
                    [asked[number][1] for number in mine],
                    new_tokens=self.new_tokens,
                    temperature=policy.temperature,
                    stops=stop_ids(bench.tokenizer),
                    generator=torch.Generator(bench.actors.device).manual_seed(seed),
                    copies=copies,
                )
            answered = [asked[number][0] for number in mine for _ in range(copies)]
            told = zip(episodes, answered, strict=True)
            texts = [without_marks(bench.tokenizer, dialogue.decode(bench.tokenizer, one, row)) for one, row in told]
            scores = [0.0] * len(texts)
            if policy.best_of > 1:
                said = ((row["prompt"], text) for row, text in zip(answered, texts, strict=True))
                scores = [fmean(heads_K) for heads_K in self._by_head(bench, said)]
            how: dict[str, Any] = {
                "stage": policy.stage,
                "adapter": policy.adapter,
                "seed": seed,
                "temperature": policy.temperature,
                "best_of": policy.best_of,
            }
            for at, number in enumerate(mine):
                its, so_far = slice(at * copies, (at + 1) * copies), answers[number]
                shown = [candidate.text for candidate in so_far]
                if self.arena:  # where to say nothing is an answer too
                    best = [text for text in texts[its] if text not in shown]
                else:
                    best = choosing.best(texts[its], scores[its], policy.best_of, shown)
                so_far += [Candidate(text=text, **how) for text in (best if self._picks else best[:wanted])]
        whole = [
            Pair(row["prompt"], drawn) if len(drawn) >= len(who) else None
            for (row, _, who), drawn in zip(asked, answers, strict=True)
        ]
        return [*whole, *[None] * (len(rows) - len(asked))]

    def _who_answers(self, number: int) -> list[Policy]:
        """A prompt, by its place. In an arena every two policies meet equally often: prompts lie in random order."""
        pairs = list(combinations(self.policies, 2))
        return list(pairs[number % len(pairs)]) if self.arena else self.policies

    @property
    def _picks(self) -> bool:
        """Whether all that one policy has drawn is there to pick from."""
        return self.choose != "random" and len(set(self.policies)) == 1 and self.policies[0].best_of == 1

    def _score(self, bench: Bench, pairs: list[Pair]) -> list[Pair]:
        """The pairs with the reward model's scores, those first that are worth a person's time most."""
        said = ((pair.prompt, candidate.text) for pair in pairs for candidate in pair.candidates)
        by_head_NK, found = iter(self._by_head(bench, said)), list[tuple[float, Pair]]()
        for pair in pairs:
            by_head_WK = [next(by_head_NK) for _ in pair.candidates]
            width = len(self.policies) if self._picks else len(pair.candidates)
            some = choosing.pick(self.choose, by_head_WK, width)
            scores = [fmean(by_head_WK[i]) for i in some]
            shown = replace(pair, candidates=[pair.candidates[i] for i in some], scores=scores)
            found.append((choosing.worth(self.choose, [by_head_WK[i] for i in some]), shown))
        return [pair for _, pair in sorted(found, key=lambda one: -one[0])]

    def _by_head(self, bench: Bench, said: Iterable[tuple[Any, str]]) -> list[list[float]]:
        """What each head of the reward model says of answers to prompts, (N, K)."""
        from pipeline.models.dialogue import Told
        from pipeline.models.sampling import Episode
        from pipeline.ppo import rewards

        told = [Told({"prompt": prompt}, Episode([], [], [], ended=True), text) for prompt, text in said]
        sequences = [rewards.conversation(bench.tokenizer, one) for one in told]
        return bench.actors.head_scores(rewards.adapter_name(self.reward), sequences, bench.at_once)

    def keep(self, block: list[Pair | None]) -> None:
        """Put the pairs of the next prompts on disk, then before the people; None for a prompt that gave no pair."""
        drawn = [_as_json(pair) for pair in block if pair is not None]
        line = {"key": self._key, "adapters": self._adapters, "prompts": len(block), "pairs": drawn}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(line, ensure_ascii=False)}\n")  # the line before may have been cut by a kill
        self._drawn += len(block)
        self.pairs += [pair for pair in block if pair is not None]
        alike = sum(pair is None for pair in block)
        if alike:
            self.told.append(say("{n} prompts passed over: their answers were alike", n=alike))

    def _read(self) -> None:
        """What these policies drew before."""
        changed: set[str] = set()
        text = self.file.read_text(encoding="utf-8", errors="replace") if self.file.exists() else ""
        for written in filter(None, text.split("\n")):
            try:
                line = json.loads(written)
            except ValueError:
                continue  # cut by a kill; its block is drawn again, to the same answers
            if line["key"] == self._key:
                self._drawn += line["prompts"]
                self.pairs += [_from_json(pair) for pair in line["pairs"]]
            else:
                changed |= {one for one, sha in line["adapters"].items() if self._adapters.get(one, sha) != sha}
        if changed and not self._drawn:
            why = say(
                "answers drawn with an earlier adapter of {stages} are not shown again; new ones are drawn",
                stages=", ".join(sorted(changed)),
            )
            self.told.append(why)


def _as_json(pair: Pair) -> dict[str, Any]:
    candidates = [candidate.model_dump() for candidate in pair.candidates]
    return {"prompt": pair.prompt, "candidates": candidates, "scores": pair.scores}


def _from_json(pair: dict[str, Any]) -> Pair:
    return Pair(pair["prompt"], [Candidate(**one) for one in pair["candidates"]], pair["scores"])
