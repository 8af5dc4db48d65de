"""The numbers of a policy, in the order people read them: what each is called and how it is written."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifact import Json

MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    better: str = "higher"
    """ "higher", "lower", or "" where neither is."""
    percent: bool = False
    digits: int = 2

    def number(self, value: float, sign: bool = False) -> str:
        scale, digits = (100, 0) if self.percent else (1, self.digits)
        rounded = round(scale * value, digits) or 0.0  # not -0.0
        return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS).replace("inf", INFINITY)

    def shown(self, found: Json, sign: bool = False) -> str:
        """A value and its interval: 71 % (59 to 80)."""
        unit = " points" if sign and self.percent else " %" if self.percent else ""
        if found["low"] is None:
            return f"{self.number(found['value'], sign)}{unit}"
        low, high = (self.number(found[end], sign) for end in ("low", "high"))
        return f"{self.number(found['value'], sign)}{unit} ({low} to {high})"

    def word(self, change: Json) -> str:
        """Whether a change of this number is "better" or "worse"; "" where chance may explain it."""
        if not self.better or change["low"] <= 0 <= change["high"]:
            return ""
        return "better" if (change["low"] > 0) == (self.better == "higher") else "worse"


METRICS = (
    Metric("question_accuracy", "questions answered right", percent=True),
    Metric("token_f1", "token F1 with the reference"),
    Metric("exact_match", "exact match", percent=True),
    Metric("choice_accuracy", "right choice is the likeliest bare answer", percent=True),
    Metric("label_accuracy", "right label is the likeliest", percent=True),
    Metric("label_f1", "labels, macro F1"),
    Metric("label_commonest", "always the commonest label would be right", better="", percent=True),
    Metric("truth", "sampled answers right", percent=True),
    # Neither is better: a stage that was paid by it has learnt its mistakes as well.
    Metric("reward", "reward of sampled answers", better=""),
    Metric("preference_accuracy", "better answer is likelier", percent=True),
    Metric("dialogue_loss", "dialogue loss, nats a token", better="lower"),
    Metric("corpus_loss", "corpus loss, nats a token", better="lower"),
    Metric("kl", "KL from the stage before, nats an answer", better="", digits=1),
    Metric("answer_length", "answer length, tokens", better="", digits=1),
    Metric("ended", "answers that end by themselves", better="", percent=True),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def columns(results: Json) -> dict[str, Json]:
    """The numbers of every policy in the order of a table; the base with examples stands beside the base without."""
    found: dict[str, Json] = {}
    for policy, numbers in results["numbers"].items():
        if policy == "base" and results["few_shot"]:
            found |= {"base, zero-shot": numbers, "base, few-shot": results["few_shot"]}
        else:
            found[policy] = numbers
    return found


def of_benchmark(row: Json) -> Metric:
    """How a number of lm-eval is called and written."""
    label = f"{row['task']}: {row['metric']}, {row['n']} items"
    return Metric(f"{row['task']}/{row['metric']}", label, row["better"], row["percent"], digits=3)
