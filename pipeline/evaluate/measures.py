"""The measures of policies and reward models, a class each.

Taking a measure leaves plain lists, item by item, that go to disk; from these come numbers with intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy

from pipeline.disk.atomic import Json
from pipeline.evaluate.measure import Finished, Measure, plain
from pipeline.measure import intervals, matching
from pipeline.measure.metric import CORPUS_LOSS, DIALOGUE_LOSS, PREFERENCE_ACCURACY, QUESTION_ACCURACY, Estimate
from pipeline.stages.stage import BASE

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

COPIES = 4
SNAPSHOT_COPIES = 1
BEST_OF = 64


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


class FurtherLoss(CorpusLoss):
    """The same of a stage's own held-out rows, where an earlier stage's are measured already: of that stage, and of the
    policies that come from it."""

    called = "loss"

    @property
    def name(self) -> str:
        return loss_of(self.more["stage"])

    @classmethod
    def wanted(cls, run: Finished) -> Iterator[Measure]:
        for stage, rows in run.further.items():
            for policy in (stage, *run.heirs[stage]):
                yield cls(policy, list(rows), {"stage": stage})


def loss_of(stage: str) -> str:
    return f"loss_of_{stage}"


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
            "right": [matching.correct(row, text) for row, text in pairs],
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
    """Scores of both answers of held-out comparisons, their lengths in tokens, and what a bag of words says of them.
    Of a reward model with several heads also the scores of each (`chosen_heads`, `rejected_heads`), and those of the
    prompts with the answers to others (`swapped_heads`)."""

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
        by_head = {key: bench.actors.head_scores(name, ids, bench.at_once) for key, ids in whole.items()}
        several = {}
        if len(bench.actors.reward_heads[name]) > 1:
            swapped = render.swapped(bench.tokenizer, self.rows)
            by_head["swapped"] = bench.actors.head_scores(name, swapped, bench.at_once)
            several = {f"{key}_heads": scores for key, scores in by_head.items()}
        return {
            **{key: [sum(heads_K) / len(heads_K) for heads_K in by_head[key]] for key in sides},
            **several,
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
MEASURES: tuple[type[Measure], ...] = (*OF_A_POLICY, FurtherLoss, FewShot, Pairs, AnswersOnTheWay, BestOfN)


def proxy_of(answers: Json) -> str | None:
    """The judge that stands for the reward: the first source by which answers were scored."""
    return next(iter(answers["scores"]), None)
