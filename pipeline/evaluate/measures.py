"""What is measured of a policy or a reward model: a class each, with what it needs, how it is taken, what it says.

Taking a measure leaves plain lists, item by item, that go to disk; from these come numbers with intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy

from pipeline.data.contracts import Row
from pipeline.disk.atomic import Json, digest
from pipeline.measure import intervals, matching
from pipeline.measure.metric import CORPUS_LOSS, DIALOGUE_LOSS, PREFERENCE_ACCURACY, QUESTION_ACCURACY, Estimate

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench
    from pipeline.evaluate.plan import Finished

METHOD = 3
"""Counts up when a measure is taken differently, so that older results are taken again."""
BASE = "base"
"""The policy that has no adapter."""
COPIES = 4
SNAPSHOT_COPIES = 1
BEST_OF = 64


@dataclass(frozen=True)
class Measure:
    """One measure of one policy or reward model, not yet taken."""

    subject: str
    rows: list[Row]
    more: Json = field(default_factory=dict)
    """Further arguments, which count for the fingerprint like everything else."""
    others: tuple[str | None, ...] = ()
    """Stages whose adapters take part besides the subject's."""
    step: int | None = None
    """Of a policy part of the way."""
    adapters: dict[str, str] = field(default_factory=dict)
    """sha256 of every adapter that takes part, by stage."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Where they lie."""
    model: Json = field(default_factory=dict)

    called: ClassVar[str]
    needs: ClassVar[str]
    """The field of Finished with the rows it is taken of; where there are none it is left out."""
    says: ClassVar[dict[str, str]] = {}
    """By the name of a number, what was taken of each item to make it of."""
    unbounded: ClassVar[tuple[str, ...]] = ()
    """Numbers that are no share: their values can lie any distance apart."""

    @property
    def name(self) -> str:
        return self.called

    @property
    def place(self) -> str:
        """The policy or reward model that is measured; "ppo@20" for a policy as it was at a step."""
        return self.subject if self.step is None else f"{self.subject}@{self.step}"

    @property
    def file(self) -> str:
        return f"{self.name}-{self.place}.json"

    @property
    def fingerprint(self) -> str:
        return digest([METHOD, self.name, self.place, plain(self.rows), self.more, self.adapters, self.model])

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        """Every measure of this kind that the finished stages allow."""
        return (cls(policy, list(getattr(run, cls.needs))) for policy in run.policies)

    def take(self, bench: Bench) -> Json:
        raise NotImplementedError

    @classmethod
    def items(cls, value: Json, like: Json) -> dict[str, Any]:
        """One value an item for each number, all shares but the `unbounded`. `like`: what it is compared with."""
        return {name: value[key] for name, key in cls.says.items()}

    @classmethod
    def numbers(cls, value: Json) -> dict[str, Estimate]:
        """What was taken says, by the name of the number."""
        return {
            name: intervals.mean(values) if name in cls.unbounded else intervals.of_share(values)
            for name, values in cls.items(value, value).items()
        }

    @classmethod
    def changes(cls, after: Json, before: Json) -> dict[str, Estimate]:
        """Each number less that of another policy, item by item."""
        ends, starts = (cls.items(value, before) for value in (after, before))
        return {
            name: intervals.difference(ends[name], starts[name], None if name in cls.unbounded else 1.0)
            for name in ends
            if name in starts
        }


class CorpusLoss(Measure):
    """`nats` and `tokens` of each held-out row: the surprise at its supervised tokens, and how many there are."""

    called, metric = "corpus_loss", CORPUS_LOSS
    needs = "corpus"

    def take(self, bench: Bench) -> Json:
        from pipeline.data import render
        from pipeline.measure import scoring

        tokenizer = bench.tokenizer
        encoded = [
            render.document(tokenizer, row["text"]) if "text" in row else render.demonstration(tokenizer, row)
            for row in self.rows
        ]
        with bench.acting_as(self.subject):
            nats = [-total for total in scoring.log_likelihoods(bench.model, tokenizer, encoded)]
        return {"nats": nats, "tokens": [sum(label != render.IGNORED for label in row.labels[1:]) for row in encoded]}

    @classmethod
    def numbers(cls, value: Json) -> dict[str, Estimate]:
        return {cls.metric.name: intervals.ratio(value["nats"], value["tokens"])}

    @classmethod
    def changes(cls, after: Json, before: Json) -> dict[str, Estimate]:
        return {cls.metric.name: intervals.ratio_difference(after["nats"], before["nats"], after["tokens"])}


class DialogueLoss(CorpusLoss):
    called, metric = "dialogue_loss", DIALOGUE_LOSS
    needs = "dialogues"


class Preferences(Measure):
    """`margins`: nats a token by which the chosen answer is likelier than the rejected one."""

    called = "preferences"

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        return (cls(policy, list(run.compared)) for policy in run.learners)

    def take(self, bench: Bench) -> Json:
        from pipeline.data import render
        from pipeline.measure import scoring

        replies = [render.pair(bench.tokenizer, row) for row in self.rows]
        with bench.acting_as(self.subject):
            chosen, rejected = scoring.token_means(bench.model, bench.tokenizer, replies)
        return {"margins": [better - worse for better, worse in zip(chosen, rejected, strict=True)]}

    @classmethod
    def items(cls, value: Json, like: Json) -> dict[str, Any]:
        return {PREFERENCE_ACCURACY.name: [margin > 0 for margin in value["margins"]]}


class Questions(Measure):
    """Greedy answers: `text`, `right` (the reference is named and no other choice is), `exact`, `f1`, `stopped`."""

    called = "questions"
    says = {QUESTION_ACCURACY.name: "right", "exact_match": "exact", "token_f1": "f1", "stopped": "stopped"}
    needs = "questions"

    def take(self, bench: Bench) -> Json:
        from pipeline.measure import answers

        shots = [message for example in self.more.get("examples", []) for message in example["messages"]]
        asked = [{**row, "prompt": shots + row["prompt"]} if shots else row for row in self.rows]
        with bench.acting_as(self.subject):
            told = answers.generate(bench.model, bench.tokenizer, asked, alike=bool(shots))
        pairs = [(row, answer.text) for row, answer in zip(self.rows, told, strict=True)]
        return {
            "text": [text for _, text in pairs],
            "right": [answers.correct(row, text) for row, text in pairs],
            "exact": [matching.exact_match(text, row["answer"]) for row, text in pairs],
            "f1": [matching.token_f1(text, row["answer"]) for row, text in pairs],
            "stopped": [answer.stopped for answer in told],
        }


class FewShot(Questions):
    """The same of the base, with dialogues put before each question."""

    called = "few_shot"

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        if run.examples and all(isinstance(row["prompt"], list) for row in run.questions):
            yield cls(BASE, run.questions, {"examples": plain(run.examples)})


class Choices(Measure):
    """`picked`: the likeliest of each question's choices; `wanted`: the right one."""

    called, says = "choices", {"choice_accuracy": "right"}
    needs = "closed"

    def take(self, bench: Bench) -> Json:
        from pipeline.evaluate import choices

        picked, wanted = choices.pick(bench, self.subject, self.rows), [row["answer"] for row in self.rows]
        right = [choice == answer for choice, answer in zip(picked, wanted, strict=True)]
        return {"picked": picked, "wanted": wanted, "right": right}


class Labels(Choices):
    """The same of rows that have a label for an answer."""

    called, says = "labels", {"label_accuracy": "right"}
    needs = "labelled"

    @classmethod
    def numbers(cls, value: Json) -> dict[str, Estimate]:
        commonest: str = Counter(value["wanted"]).most_common(1)[0][0]  # what a rule that does not look would answer
        return super().numbers(value) | {
            "label_f1": intervals.macro_f1(value["wanted"], value["picked"]),
            "label_commonest": intervals.proportion([label == commonest for label in value["wanted"]]),
        }


class Pairs(Measure):
    """Scores of both answers of held-out comparisons, their lengths in tokens, and what a bag of words says of them."""

    called = "pairs"

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        for reward, rows in run.rewards.items():
            yield cls(reward, list(rows.test or []), {"train": plain(rows.train)})

    def take(self, bench: Bench) -> Json:
        from pipeline.data import render
        from pipeline.data.baselines import said, word_margins
        from pipeline.ppo.rewards import adapter_name

        sides, name, train = ("chosen", "rejected"), adapter_name(self.subject), self.more["train"]
        whole = {key: [render.conversation(bench.tokenizer, row, key) for row in self.rows] for key in sides}
        known, asked = ([(said(row["chosen"]), said(row["rejected"])) for row in some] for some in (train, self.rows))
        return {
            **{key: bench.actors.scores(name, ids, bench.at_once) for key, ids in whole.items()},
            **{f"{key}_length": [len(ids) for ids in sequences] for key, sequences in whole.items()},
            "guideline": [row.get("guideline") for row in self.rows],
            "bag_of_words": word_margins(known, asked) or [0.0] * len(self.rows),
        }


class Answers(Measure):
    """Answers sampled at the training temperature, `copies` to a prompt, with the same random draws for every policy.

    Tables of (prompts, copies): text, length (tokens), ended, truth (1 right, 0 wrong), scores by source, and kl, which
    is log p of the policy, as the sampler noted it, less that of `more["reference"]`, where one is named.
    """

    called, unbounded = "answers", ("reward", "kl", "answer_length")

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        return (cls._of(run, policy, COPIES, run.references.get(policy)) for policy in run.policies)

    @classmethod
    def _of(cls, run: Finished, policy: str, copies: int, reference: str | None, step: int | None = None) -> Measure:
        more = run.sampling | {"copies": copies, "reference": reference}
        return cls(policy, run.prompts, more, (*run.sampling["sources"], reference), step)

    def take(self, bench: Bench) -> Json:
        from pipeline.evaluate import sampled

        return sampled.take(bench, self.place, self.rows, self.more)

    @classmethod
    def items(cls, value: Json, like: Json) -> dict[str, Any]:
        tables = {"reward": value["scores"].get(proxy_of(like)), "truth": value["truth"], "kl": value["kl"]}
        tables |= {"answer_length": value["length"], "ended": value["ended"]}
        return {name: numpy.asarray(of, dtype=float).mean(1) for name, of in tables.items() if of is not None}

    @classmethod
    def changes(cls, after: Json, before: Json) -> dict[str, Estimate]:
        return {name: found for name, found in super().changes(after, before).items() if name != "kl"}


class AnswersOnTheWay(Answers):
    """The same of a policy as it was at a step of its training."""

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        for policy, steps in run.snapshots.items():
            for step in steps:
                yield cls._of(run, policy, SNAPSHOT_COPIES, run.references[policy], step)


class BestOfN(Answers):
    """Many answers to a prompt by one policy, among which a reward may choose."""

    called = "best_of_n"

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        if run.drawn_from and run.sampling["sources"]:
            yield cls._of(run, run.drawn_from, BEST_OF, None)


OF_A_POLICY: tuple[type[Measure], ...] = (CorpusLoss, DialogueLoss, Preferences, Questions, Choices, Labels, Answers)
"""Those whose numbers stand beside each other, policy by policy."""
MEASURES: tuple[type[Measure], ...] = (*OF_A_POLICY, FewShot, Pairs, AnswersOnTheWay, BestOfN)


def proxy_of(answers: Json) -> str | None:
    """The judge that stands for the reward: the first source by which answers were scored."""
    return next(iter(answers["scores"]), None)


def plain(rows: Sequence[Row]) -> list[Row]:
    """Rows without where they stood."""
    return [{key: value for key, value in row.items() if key != "_place"} for row in rows]
