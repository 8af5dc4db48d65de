"""What every measure is: of which policy or reward model, what it needs, how it is taken, what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.data.contracts import Row
from pipeline.disk.atomic import Json, digest
from pipeline.measure import intervals
from pipeline.measure.metric import Estimate
from pipeline.stages.stage import Rows

if TYPE_CHECKING:
    from pipeline.evaluate.bench import Bench

METHOD = 3
"""Counts up when a measure is taken differently, so that older results are taken again."""


@dataclass(frozen=True)
class Finished:
    """What the finished stages of a run have: policies to measure, and held-out rows to measure them by."""

    policies: list[str]
    """The base first."""
    learners: list[str]
    """The policies but the base and those that learnt from documents alone."""
    corpus: Sequence[Row]
    dialogues: Sequence[Row]
    compared: Sequence[Row]
    questions: list[Row]
    closed: list[Row]
    """Of these, those that have choices."""
    labelled: list[Row]
    """Those that have a label for an answer."""
    examples: list[Row]
    """Short dialogues of the training data."""
    rewards: dict[str, Rows]
    """The comparisons of every reward model."""
    prompts: list[Row]
    sampling: Json
    """How prompts are answered, and by which judges the answers are scored."""
    references: dict[str, str | None]
    """The policies trained on preferences, and where each started from."""
    snapshots: dict[str, list[int]]
    """Steps at which such a policy was kept on its way."""
    drawn_from: str | None
    """The policy that best-of-n is drawn from."""
    further: dict[str, Sequence[Row]] = field(default_factory=dict)
    """The held-out rows of stages that learn documents or dialogues, where an earlier stage's are `corpus` or
    `dialogues`."""
    heirs: dict[str, list[str]] = field(default_factory=dict)
    """The policies that come from each stage."""


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


def plain(rows: Sequence[Row]) -> list[Row]:
    """Rows without where they stood."""
    return [{key: value for key, value in row.items() if key != "_place"} for row in rows]
