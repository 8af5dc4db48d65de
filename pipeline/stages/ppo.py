"""Proximal policy optimization (arXiv 1707.06347): policy, reference, reward and critic are adapters of one base."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from pipeline.data import render
from pipeline.data.contracts import PROMPT_ONLY, Row
from pipeline.disk.artifact import Artifact
from pipeline.errors import UserError, complaint, suggest
from pipeline.measure.metric import QUESTION_ACCURACY, Metric
from pipeline.models.own_code import OwnCodeError, load_named, refusal
from pipeline.ppo.engine_settings import EngineSettings
from pipeline.ppo.settings import CHECKPOINTS_KEPT, PPOSettings, RolloutSettings
from pipeline.ppo.shipped import SHIPPED
from pipeline.stages.arguments import undefined, without_auto
from pipeline.stages.reward_term import RewardTerm
from pipeline.stages.stage import Context, PolicySpec, Result, Stage

if TYPE_CHECKING:
    from pipeline.ppo.rewards import Source
    from pipeline.ppo.trainer import RolloutTrainer


class PaidSpec(PolicySpec):
    """The section of a stage that is paid for its own answers."""

    reward: str | list[RewardTerm] | None = Field(default=None, validate_default=True)
    """What it is paid by: a reward stage, `path.py:function`, `math` or another [function that comes with
    OneBase](rewards.md), or a list of {source, weight, truth, lower_bound, length_penalty}."""
    rollout: EngineSettings | None = None
    """Another program that samples the answers, see [rollouts by an engine](rollouts.md). Without it the model that is
    trained samples them itself."""

    @field_validator("reward", "rollout", mode="before")
    @classmethod
    def _is_of_its_form(cls, given: Any, info: ValidationInfo) -> Any:
        if info.field_name == "reward" and isinstance(given, dict):
            raise complaint("is one section; write it as a list: reward: [{source: ..., weight: ...}]")
        if info.field_name == "rollout" and isinstance(given, str):
            raise complaint(f"is a section: write rollout: {{engine: {given}}}")
        return given

    @field_validator("reward")
    @classmethod
    def _pays(cls, reward: str | list[RewardTerm] | None) -> str | list[RewardTerm]:
        if not reward:
            raise complaint("is missing: name a reward stage, or a function as path.py:function")
        terms = _terms(reward)
        if len({term.source for term in terms}) < len(terms):
            raise complaint("names a source twice; name it once, with one weight")
        if not any(term.weight for term in terms):
            raise complaint("pays nothing: every weight is 0, and a source with weight 0 is only measured")
        return reward

    def reward_terms(self) -> list[RewardTerm]:
        return _terms(self.reward or [])

    def further_parts(self) -> dict[str, Any]:
        # What is only measured by a term, its truth, changes no training.
        words = {"lower_bound", "length_penalty"}
        unsaid = [{"truth"} | {word for word in words if not getattr(term, word)} for term in self.reward_terms()]
        terms = [term.model_dump(exclude=no) for term, no in zip(self.reward_terms(), unsaid, strict=True)]
        return {"reward": terms, **({"rollout": self.rollout.engine} if self.rollout else {})}

    def check_among(self, stages: dict[str, Stage], *place: str) -> None:
        super().check_among(stages, *place)
        self._check_rollout(*place)
        for term in self.reward_terms():
            word = next((word for word in ("lower_bound", "length_penalty") if getattr(term, word)), None)
            if word and (term.file or term.shipped):
                problem = f"{word} is for a reward stage, and {term.source} is a function: let it do so itself"
                raise complaint(problem, *place, "reward")
            if term.file is not None:
                name = term.source.rpartition(":")[2]
                if not os.path.isfile(term.file):
                    raise complaint(f"no such file: {term.file}", *place, "reward")
                if problem := undefined(term.file, name):
                    raise complaint(problem, *place, "reward")
            elif term.shipped:
                if term.source in stages:
                    problem = "is the name of a reward function that comes with OneBase: give the stage another name"
                    raise complaint(problem, "stages", term.source)
                if term.shipped.missing:
                    problem = f"{term.source} needs {term.shipped.library}: pip install 'onebase[rewards]'"
                    raise complaint(problem, *place, "reward")
                if term.truth and not term.shipped.right_or_wrong:
                    problem = f"{term.source} pays shares from 0 to 1; truth: true is for a function that gives 0 or 1"
                    raise complaint(problem, *place, "reward")
            elif term.source not in stages:
                paying = [stage for stage, kind in stages.items() if kind.ranks]
                problem = f"no reward stage '{term.source}' in this recipe{suggest(term.source, [*paying, *SHIPPED])}"
                if term.source.endswith(".py"):
                    problem = f"{term.source} is a file; name its function too: {term.source}:FUNCTION"
                raise complaint(problem, *place, "reward")
            elif not stages[term.source].ranks:
                kind = stages[term.source].name
                raise complaint(f"'{term.source}' is a {kind} stage, not a reward model", *place, "reward")

    def check_rows(self, train: Sequence[Row], test: Sequence[Row] | None) -> None:
        """Raises UserError for a row that lacks what a reward function needs of it."""
        columns = set[str]()
        for row in chain(train, test or []):
            columns |= row.keys()
            if row.keys() & {"prompts", "completions"}:
                raise UserError(f"{row['_place']}: a column named 'prompts' or 'completions' must get another name")
        for term in self.reward_terms():
            if term.shipped:
                term.shipped.check(term.source, chain(train, test or []))
            elif term.file is not None:
                self._check_function(term.source, columns)

    def _check_function(self, reference: str, columns: set[str]) -> None:
        """Raises OwnCodeError for a function that cannot be called as it will be (ppo/rewards.py)."""
        named = load_named(reference, "reward")
        if isinstance(named, type):
            if self.environment is None:
                problem = f"{reference} is a class, and pays only as the environment of the stage: add environment:"
                raise OwnCodeError("reward", problem)
            if not hasattr(named, "get_reward"):
                raise OwnCodeError("reward", f"{reference} has no method get_reward(self), by which it pays")
            return
        names = {"prompts", "completions", *columns} - {"prompt", "_place", "environment"}
        names |= {"tools", "environments"} if self.environment else set()
        if why := refusal(named, names):
            raise OwnCodeError(
                "reward",
                f"{reference} is called by keyword with {', '.join(sorted(names))}, and refuses that: {why}. Write "
                f"def {reference.rpartition(':')[2]}(completions, **columns), and name the columns that it reads",
            )

    def engine(self) -> EngineSettings | None:
        return self.rollout

    def _check_rollout(self, *place: str) -> None:
        sampling = self.sampling()
        mine = [word for word in ("dequantize_rollout", "cache_implementation") if getattr(sampling, word, None)]
        mine += ["environment"] if self.environment else []
        if self.rollout and mine:
            raise complaint(f"does not go together with {mine[0]}: leave one of the two out", *place, "rollout")
        corrects = [word for word in self.train if word.startswith("vllm_")]
        if corrects and not self.rollout:
            raise complaint("is for an engine: add rollout: {engine: vllm} to the stage", *place, "train", corrects[0])


class RolloutSpec(PaidSpec):
    """The section of a stage that learns from its own answers rollout after rollout, by a trainer of ppo/."""

    config_class: ClassVar[type[RolloutSettings]]

    def learns_again(self) -> dict[str, str]:
        return {kind: f"{AGAIN[kind]}_coef" for kind in self.rollouts().kept_coefs}

    def check_among(self, stages: dict[str, Stage], *place: str) -> None:
        super().check_among(stages, *place)
        for word in ("max_tool_calling_iterations", "tool_timeout"):
            if self.environment is None and word in self.train:
                raise complaint("is for a stage with an environment: name one, or remove it", *place, "train", word)

    def rollouts(self) -> RolloutSettings:
        return self.config_class(**without_auto(self.train))


class PPOSpec(RolloutSpec):
    kind: Literal["ppo"] = "ppo"
    config_class = PPOSettings


AGAIN = {"sft": "sft", "pretrain": "pretraining"}
"""How coefficient and loss of an earlier stage's rows are called, by its kind."""


def _terms(reward: str | list[RewardTerm]) -> list[RewardTerm]:
    return [RewardTerm(source=reward)] if isinstance(reward, str) else reward


def read_sources(spec: PaidSpec, models: dict[str, Artifact]) -> list[Source]:
    """The sources of a stage's reward, with what its reward models have noted of their scores. `models`: by name.

    Raises UserError for a reward function that cannot be imported.
    """
    from pipeline.ppo import rewards

    sources = []
    for term in spec.reward_terms():
        of_a_model: dict[str, Any] = {}
        if term.is_stage:
            noted, penalty = models[term.source].finished(), term.length_penalty
            if penalty == "fitted" and noted.length_slope is None:
                raise UserError(f"{models[term.source].folder} holds no length_slope. Run '{term.source}' again.")
            of_a_model = {
                "head_means": tuple(noted.head_means),
                "lower_bound": term.lower_bound,
                "length_penalty": noted.length_slope if penalty == "fitted" else penalty,
            }
        sources.append(rewards.source(term.source, term.weight, term.truth, **of_a_model))
    return sources


def encode(tokenizer: Any, row: Row) -> list[render.Encoded]:
    return [render.Encoded.without_loss(render.prompt(tokenizer, row))]


def run(spec: PPOSpec, ctx: Context) -> Result:
    from pipeline.ppo.ppo import PPOTrainer

    return learn_from_answers(spec, ctx, PPOTrainer)


def learn_from_answers(spec: RolloutSpec, ctx: Context, trainer_class: type[RolloutTrainer]) -> Result:
    """A stage whose policy answers, is paid for it, and learns from that, by a trainer of ppo/."""
    from transformers import set_seed

    from pipeline.measure import answers
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.models.forward import checkpoint_first
    from pipeline.ppo import actors as roles
    from pipeline.ppo import engine, held_out, loop, rewards
    from pipeline.ppo import invariants as handovers
    from pipeline.ppo.keeping import Kept
    from pipeline.stages import earlier
    from pipeline.training import invariants
    from pipeline.training import trainer as shared

    result = Result()
    engine.refuse_several(spec.rollout, ctx)
    settings = spec.rollouts()
    tokenizer = bases.load_tokenizer(ctx.model)
    limits = settings.max_length, settings.response_length, spec.data.on_bad_row == "skip"
    ctx, models, result.counts, result.refused = loop.prepare(ctx, tokenizer, *limits)
    sources = read_sources(spec, models)
    kept = []
    for name, source in ctx.data.earlier.items():
        texts, counts = earlier.store(ctx, tokenizer, name)
        result.counts |= counts
        kind = source.section.kind
        kept.append(Kept(f"{AGAIN[kind]}_loss", settings.kept_coefs[kind], texts))

    # base
    set_seed(ctx.seed)
    ctx.tell_loading()
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)

    # adapters: the policy, itself again as reference, the reward models, the critic
    model = shared.policy(ctx, base)
    result.invariants |= invariants.same_base(ctx, result.base_digest)
    heads = loop.add_roles(model, models, settings)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if settings.checkpointing is not True:
            checkpoint_first(model, settings.checkpointing)
    actors = roles.Actors(model, tokenizer.pad_token_id, settings.temperature, settings.critic, heads)

    # trainer
    trainer = trainer_class(actors, tokenizer, ctx.data.train, sources, settings, ctx.seed, kept)
    result.invariants |= handovers.policy_is_reference(trainer)
    for name, parent in models.items():
        result.invariants |= handovers.scores_as_it_did(actors, rewards.adapter_name(name), parent, ctx.model.dtype)
    result.invariants |= handovers.one_copy_of_the_base(model)

    trainer.engine = engine.start(ctx, spec.rollout, settings, model, tokenizer, result.base_digest)

    # train, with the held-out numbers before and after
    ctx.tell_measuring("before")
    start = held_out.ask(trainer, ctx.data.test or [])
    result.before = held_out.numbers(start)
    result.before |= answers.ask(model, tokenizer, ctx, result.samples, "before")
    result.counts |= loop.train(trainer, ctx)
    result.invariants |= invariants.processes_agree(actors.trained("policy") | actors.trained("value"))
    ctx.tell_measuring("after")
    end = held_out.ask(trainer, ctx.data.test or [])
    result.after = held_out.numbers(end) | held_out.gain(start, end)
    result.invariants |= loop.judge_end(trainer, ctx, end)
    result.invariants |= engine.end(trainer.engine)
    actors.act_as(roles.POLICY)
    result.after |= answers.ask(model, tokenizer, ctx, result.samples, "after")

    # save
    result.invariants |= invariants.base_unchanged(model, result.base_digest)
    for name in adapters.others(model):
        model.delete_adapter(name)
    shared.save(model, tokenizer, ctx)
    return result


HEADLINES = (Metric("reward", "reward of held-out answers"), QUESTION_ACCURACY)
NUMBERS = (
    *("reward", "reward_gain", "reward_gain_low", "reward_gain_high"),
    *("kl", "answer_length", "ended", "question_accuracy", "stopped"),
)
STAGE = Stage(
    section=PPOSpec,
    contract=PROMPT_ONLY,
    checkpoints=CHECKPOINTS_KEPT,
    raises="reward",
    headlines=HEADLINES,
    numbers=NUMBERS,
    encode=encode,
    run=run,
    learns="answers by itself, is scored, and learns to give answers of a higher score",
    colour="#c43d54",
)
