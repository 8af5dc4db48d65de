"""A toy stage: gradient descent on one dialogue after another. tests/test_toy_stage.py puts it among the others."""

from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, Field

from pipeline.data import render
from pipeline.data.contracts import DEMONSTRATION
from pipeline.measure.metric import DIALOGUE_LOSS
from pipeline.stages.stage import Context, PolicySpec, Result, Stage


class ToySettings(BaseModel, extra="forbid", strict=True):
    max_steps: int = Field(default=4, ge=1)


class ToySpec(PolicySpec):
    kind: Literal["toy"] = "toy"
    config_class = ToySettings


def run(spec: ToySpec, ctx: Context) -> Result:
    import torch

    from pipeline.measure import scoring
    from pipeline.models import adapters
    from pipeline.models import base as bases
    from pipeline.training import trainer as shared

    settings, result = ToySettings(**spec.train), Result()
    tokenizer = bases.load_tokenizer(ctx.model)
    train, test = ([render.demonstration(tokenizer, row) for row in part] for part in (ctx.data.train, ctx.data.test))
    base = bases.load_base(ctx.model, tokenizer)
    result.base_digest = bases.frozen_digest(base)
    model = shared.policy(ctx, base)
    optimizer = torch.optim.SGD(adapters.trainable(model).values(), lr=0.1)
    result.before = scoring.language_model(model, tokenizer, test)
    ctx.claim()
    for row in train[: settings.max_steps]:
        with bases.computing(model):
            loss = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result.after = scoring.language_model(model, tokenizer, test)
    shared.save(model, tokenizer, ctx)
    return result


STAGE = Stage(
    section=ToySpec,
    contract=DEMONSTRATION,
    headlines=(replace(DIALOGUE_LOSS, name="loss"),),
    numbers=("loss", "loss_low", "loss_high", "perplexity"),
    held_out_loss=DIALOGUE_LOSS,
    encode=lambda tokenizer, row: [render.demonstration(tokenizer, row)],
    run=run,
)
