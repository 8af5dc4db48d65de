"""One idea of a number: what it is called and how it is written (Metric), and how sure it is (Estimate)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.language.say import say, translated

MINUS = "\N{MINUS SIGN}"
INFINITY = "\N{INFINITY}"


@dataclass(frozen=True)
class Estimate:
    """A number and the 95 % interval around it, from `n` independent observations; None for both ends where nothing is
    known of them."""

    value: float
    low: float | None
    high: float | None
    n: int
    how: str
    """By which method the interval was made."""

    @property
    def above(self) -> bool:
        """The whole interval lies above 0: a rise that chance does not explain."""
        return self.low is not None and self.low > 0

    @property
    def below(self) -> bool:
        return self.high is not None and self.high < 0

    @property
    def arms(self) -> list[list[float]]:
        """How far the interval reaches to each side, as matplotlib's error bars take it."""
        low, high = (self.value if end is None else end for end in (self.low, self.high))
        return [[self.value - low], [high - self.value]]

    def numbers(self, name: str) -> dict[str, float]:
        """As a stage's manifest holds it: the value and the ends that are known, each under a name of its own."""
        held = {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return {key: value for key, value in held.items() if value is not None and math.isfinite(value)}

    @classmethod
    def among(cls, numbers: Mapping[str, float], name: str, n: int = 0, how: str = "") -> Estimate | None:
        """What `numbers` put into a manifest; None where it is not there."""
        if name not in numbers:
            return None
        return cls(numbers[name], numbers.get(f"{name}_low"), numbers.get(f"{name}_high"), n, how)

    def scaled(self, scale: float) -> Estimate:
        low, high = (None if end is None else end * scale for end in (self.low, self.high))
        return Estimate(self.value * scale, low, high, self.n, self.how)


@dataclass(frozen=True)
class Metric:
    """What is measured, and how it is written in terminal, report and card."""

    name: str
    label: str
    direction: Literal["higher", "lower", ""] = "higher"
    """Which is better; "" where neither is."""
    unit: str = ""
    """ "%" for a share, whose changes are points; else of the number, where it has one."""
    digits: int = 2
    """After the point; of a share there are none. `fine` below gives one more."""

    @property
    def said(self) -> str:
        """The label in the language that is spoken."""
        return translated(self.label)

    @property
    def heading(self) -> str:
        """The label with the unit, where the numbers do not carry it themselves."""
        if self.unit in ("", "%"):
            return self.said
        return say("{label}, {unit}", label=self.said, unit=translated(self.unit))

    def number(self, value: float, sign: bool = False, fine: bool = False) -> str:
        """Without a unit: 71, or +3 with `sign`."""
        scale, digits = (100, int(fine)) if self.unit == "%" else (1, self.digits + fine)
        rounded = round(scale * value, digits) or 0.0  # not -0.0
        return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS).replace("inf", INFINITY)

    def written(self, value: float, sign: bool = False, fine: bool = False) -> str:
        """With its unit where that is a share's: 71 %, or +3 points with `sign`."""
        number = self.number(value, sign, fine)
        if self.unit != "%":
            return number
        return say("{number} points", number=number) if sign else f"{number} %"

    def range(self, found: Estimate, sign: bool = False, fine: bool = False) -> str:
        """The interval: 59 to 80; empty where there is none."""
        if found.low is None or found.high is None:
            return ""
        low, high = (self.number(end, sign, fine) for end in (found.low, found.high))
        return say("{low} to {high}", low=low, high=high)

    def shown(self, found: Estimate, sign: bool = False) -> str:
        """In a table that says that intervals are of 95 %: 71 % (59 to 80)."""
        interval = self.range(found, sign)
        written = self.written(found.value, sign)
        return say("{number} ({interval})", number=written, interval=interval) if interval else written

    def lines(self, found: Estimate, sign: bool = False) -> str:
        """In a narrow column: 71 % in one line, 59 to 80 in the next."""
        return "\n".join(filter(None, (self.written(found.value, sign), self.range(found, sign))))

    def change(self, found: Estimate) -> str:
        """In a sentence: +3 points, 95 %: -1 to +7."""
        interval = self.range(found, sign=True)
        change = self.written(found.value, sign=True)
        return say("{change}, 95 %: {interval}", change=change, interval=interval) if interval else change

    def word(self, change: Estimate) -> str:
        """Whether a change of this number is "better" or "worse"; "" where chance may explain it."""
        if not self.direction or not (change.above or change.below):
            return ""
        return "better" if change.above == (self.direction == "higher") else "worse"


def perplexity(loss: float) -> float:
    """Of a loss in nats a token."""
    return math.exp(min(loss, 700.0))


SHARE = Metric("share", "share", unit="%")
ELO = Metric("elo", "Elo", digits=0)
QUESTION_ACCURACY = Metric("question_accuracy", "questions answered right", unit="%")
TRUTH = Metric("truth", "sampled answers right", unit="%")
PREFERENCE_ACCURACY = Metric("preference_accuracy", "better answer is likelier", unit="%")
DIALOGUE_LOSS = Metric("dialogue_loss", "dialogue loss", "lower", "nats a token")
CORPUS_LOSS = Metric("corpus_loss", "corpus loss", "lower", "nats a token")
# Neither is better: a stage that was paid by it has learnt its mistakes as well.
REWARD = Metric("reward", "reward of sampled answers", "")
KL = Metric("kl", "KL from the stage before", "", "nats an answer", digits=1)
METRICS = (
    QUESTION_ACCURACY,
    Metric("token_f1", "token F1 with the reference"),
    Metric("exact_match", "exact match", unit="%"),
    Metric("choice_accuracy", "right choice is the likeliest bare answer", unit="%"),
    Metric("label_accuracy", "right label is the likeliest", unit="%"),
    Metric("label_f1", "labels, macro F1"),
    Metric("label_commonest", "always the commonest label would be right", "", "%"),
    TRUTH,
    REWARD,
    PREFERENCE_ACCURACY,
    DIALOGUE_LOSS,
    CORPUS_LOSS,
    KL,
    Metric("answer_length", "answer length", "", "tokens", digits=1),
    Metric("ended", "answers that end by themselves", "", "%"),
)
"""What an evaluation says of a policy, in the order people read it."""
BY_NAME = {metric.name: metric for metric in METRICS}
