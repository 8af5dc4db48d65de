"""When learning from its own answers goes wrong, said by stated rules: some stop the run, some warn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pipeline.ppo.settings import RolloutSettings

WINDOW = 5
"""Steps in a row, or compared with the first ones, before a rule speaks."""
COLLAPSED = 0.05
"""Share of the entropy at the start under which the policy has stopped exploring."""
ALIKE = 1e-6
"""Deviation of a step's scores, as a share of their mean, that is rounding."""
RUNAWAY = 1.5
"""Answers this many times as long as at the start, while reward rises."""

KEPT = ("kl", "entropy", "answer_length", "reward", "eos_share", "empty_share", "score", "score_std", "grad_norm",
        "frac_reward_zero_std", "tools/failure_frequency")  # fmt: skip


@dataclass
class Health:
    """Watches a run. `verdict` takes a step's numbers and gives what is wrong: what must stop the run, and warnings."""

    settings: RolloutSettings
    history: list[dict[str, float]] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)

    def verdict(self, step: dict[str, float]) -> tuple[str | None, list[str]]:
        """The reason to stop, or None; and the warnings not given before."""
        self.history.append({key: step[key] for key in KEPT if key in step})
        self.history = self.history[:WINDOW] + self.history[WINDOW:][-WINDOW:]
        return self._stop(step), self._new(self._warnings(step))

    def _stop(self, step: dict[str, float]) -> str | None:
        broken = [name for name, value in step.items() if not math.isfinite(value)]
        if broken:
            return f"{broken[0]} is {step[broken[0]]}: lower learning_rate or max_grad_norm"
        settings = self.settings
        if step.get("kl", 0.0) > settings.kl_stop:
            return (
                f"answers are {step['kl']:.1f} nats from the reference (kl_stop {settings.kl_stop:g}): the policy has "
                f"left what the reward model knows. Raise {settings.word_of_kl_coef}, or lower learning_rate"
            )
        recent = self.history[-WINDOW:]
        if len(recent) < WINDOW:
            return None
        if all(past["eos_share"] == 0 for past in recent):
            return (
                f"no answer of the last {WINDOW} steps ended by itself: raise {settings.word_of_length}, or see "
                "whether the policy it starts from stops at all"
            )
        if all(past["empty_share"] == 1 for past in recent):
            return f"all answers of the last {WINDOW} steps were empty: the reward favours empty answers"
        if all(past.get("frac_reward_zero_std") == 1 for past in recent):
            return (
                f"in the last {WINDOW} steps all answers of every group were paid alike, and only differences within a "
                "group are learnt from: choose prompts that are neither too easy nor too hard, raise num_generations "
                "or temperature, or pay by finer steps"
            )
        if all(past["grad_norm"] == 0 for past in recent):
            return f"the policy's gradient was zero in the last {WINDOW} steps: it has stopped learning"
        return None

    def _warnings(self, step: dict[str, float]) -> list[str]:
        notes, settings = [], self.settings
        first, last = self.history[:WINDOW], self.history[-WINDOW:]
        if step["entropy"] < COLLAPSED * self.history[0]["entropy"]:
            notes.append(
                "the entropy has collapsed: the policy gives almost always the same answer. Raise "
                f"{settings.word_of_kl_coef} or temperature"
            )
        if step["eos_share"] < 0.5:
            notes.append(
                f"more than half of the answers are cut at {settings.word_of_length}: raise it, or "
                f"{settings.word_of_penalty}"
            )
        if len(last) == WINDOW and all(past["score_std"] <= ALIKE * abs(past["score"]) for past in last):
            notes.append(f"all answers of the last {WINDOW} steps got the same reward: there is nothing to learn from")
        if len(last) == WINDOW and all(past.get("tools/failure_frequency") == 1 for past in last):
            notes.append(
                f"every call of a tool in the last {WINDOW} steps went wrong: show the model right calls first (sft), "
                "or call the tool by hand"
            )
        if len(self.history) >= 2 * WINDOW:
            longer = _mean(last, "answer_length") / max(_mean(first, "answer_length"), 1.0)
            if longer > RUNAWAY and _mean(last, "reward") > _mean(first, "reward"):
                notes.append(
                    f"reward rises while answers have grown {longer:.1f} times as long: the reward model may favour "
                    "length"
                )
        return notes

    def _new(self, warnings: list[str]) -> list[str]:
        # The figures in a warning change from step to step; its first words do not.
        new = [warning for warning in warnings if warning[:20] not in self.warned]
        self.warned += [warning[:20] for warning in new]
        return new


def _mean(steps: list[dict[str, float]], key: str) -> float:
    return sum(step[key] for step in steps) / len(steps)
