"""Which models work, tried: docs/models.md, made from a tiny random model of each family's own architecture.

    python scripts/model_support.py [--only FAMILY] [--json FILE] [--write docs/models.md]

Each family runs in a process of its own: loading in nf4, the chat template, the ends of turns, what all-linear reaches,
packed batches and sampling against one row at a time, the plan, and two steps of every stage. A cell says `yes` or why
not. Needs no download and no GPU. The families are in scripts/model_families.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

from model_families import FAMILIES, Family, make_base
from model_page import page_of

from pipeline.disk.atomic import write_text

Json = dict[str, Any]
YES = "yes"
TOLERANCE = 1e-4
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo")
PATIENCE = 600
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
WORDS = ("Hello, friend.", "Two it is.")
TALK = [
    {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": WORDS[0]},
    {"role": "user", "content": "Two?"}, {"role": "assistant", "content": WORDS[1]},
]  # fmt: skip


class Fault(Exception):
    """What a cell says instead of `yes`."""


@dataclass
class Case:
    """A family with its tiny base on disk."""

    family: Family
    base: Path
    scratch: Path

    def spec(self, quantize: str = "none", dtype: str = "float32") -> Any:
        from pipeline.models.spec import ModelSpec

        return ModelSpec(
            base=str(self.base), quantize=quantize, dtype=dtype, lora=LORA, attn_implementation=self.family.attention
        )

    @property
    def tokenizer(self) -> Any:
        from pipeline.models.base import load_tokenizer

        return load_tokenizer(self.spec())

    def base_model(self, quantize: str = "none", dtype: str = "float32") -> Any:
        from pipeline.models.base import load_base

        return load_base(self.spec(quantize, dtype), self.tokenizer)

    def rows(self) -> list[list[int]]:
        """Token ids of unlike lengths: two begin alike."""
        text = "The islands lie far out at sea, and nobody has counted them twice. "
        rows = [text, text + "They have names.", "A short row.", "Another row of a middling length, which ends here."]
        return [self.tokenizer(row, add_special_tokens=False)["input_ids"] for row in rows]


def loads(case: Case) -> str:
    import torch

    model = case.base_model("nf4", "bfloat16")
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    packed = [module for module in linear if type(module).__name__ == "Linear4bit"]
    if not packed:
        raise Fault("no layer is quantised")
    said = [YES]
    if any(weight.dim() == 3 and "experts" in name for name, weight in model.named_parameters()):
        said.append("its experts not in 4 bits")
    if case.family.attention != "sdpa":
        said.append(f"with `attn_implementation: {case.family.attention}`")
    return ", ".join(said)


def template(case: Case) -> str:
    """Loss falls on what the family's marks say, as somebody has read it from the rendered text (model_families.py)."""
    from pipeline.data import render

    tokenizer = case.tokenizer
    encoded = render.demonstration(tokenizer, {"messages": TALK})
    runs: list[list[int]] = []
    for place, label in enumerate(encoded.labels):
        if label != render.IGNORED:
            if place == 0 or encoded.labels[place - 1] == render.IGNORED:
                runs.append([])
            runs[-1].append(label)
    found = [tokenizer.decode(run) for run in runs]
    wanted = [said.format(word) for said, word in zip(case.family.says, WORDS, strict=True)]
    if found != wanted:
        raise Fault(f"loss on {found!r} and not on {wanted!r}")
    return YES


def ends(case: Case) -> str:
    from pipeline.data.tokens import stop_ids

    tokenizer = case.tokenizer
    found = set(tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)))
    marks = set(case.family.marks)
    wanted = {mark for mark in marks for end in case.family.ends if end.startswith(mark)}
    if not wanted <= found:
        raise Fault(f"stops at {', '.join(sorted(found))} and not at {', '.join(sorted(wanted - found))}")
    return " ".join(f"`{mark}`" for mark in sorted(found))


def targets(case: Case) -> str:
    """The layers that all-linear puts an adapter on, and which of them no text reaches."""
    import torch
    from peft.tuners.lora import LoraLayer

    from pipeline.models import adapters
    from pipeline.models.base import computing

    model = adapters.fresh(case.base_model("nf4"), LORA)
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    names = sorted({_target(name, module) for name, module in adapted})
    model.train()
    ids = torch.tensor(case.rows()[:1])
    with computing(model):
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    idle = [name for name, module in adapted if module.lora_B["default"].weight.grad is None]
    if idle:
        raise Fault(f"{len(idle)} of {len(adapted)} adapted layers are not reached by text, such as {idle[0]}")
    return ", ".join(names)


def _target(name: str, module: Any) -> str:
    """A layer's own name; of a parameter without a layer its holder's and its own."""
    own = name.removesuffix(".base_layer").rpartition(".")[2]
    parameter = getattr(module, "parameter_name", "weight")
    return own if parameter == "weight" else f"{own}.{parameter}"


def batches(case: Case) -> str:
    """A batch's log-probabilities against transformers' eager attention on one row at a time."""
    import torch

    from pipeline.data.render import padded
    from pipeline.models.packing import NAME

    model, rows = case.base_model(), case.rows()
    wanted = _alone(case, rows)
    packs = (model.config.get_text_config()._attn_implementation or "") == NAME
    worst = 0.0
    for side in ("right", "left"):
        ids, mask = padded(rows, case.tokenizer.pad_token_id, side=side)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for training in (False, True):
            model.train(training)
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            found = out.log_softmax(-1)
            worst = max([worst, *(_far(f[m.bool()], w) for f, m, w in zip(found, mask, wanted, strict=True))])
    if worst > TOLERANCE:
        raise Fault(f"off by {worst:.2g} nats ({'packed' if packs else 'padded'})")
    return YES if packs else f"padded ({_why_not_packed(case)})"


def _why_not_packed(case: Case) -> str:
    from pipeline.models import packing
    from pipeline.models.base import load_config

    mixing = set(getattr(load_config(case.spec()), "layer_types", None) or []) - packing.ATTENDING
    return f"{', '.join(sorted(mixing))} layers" if mixing else "by what transformers says of its class"


def documents(case: Case) -> str:
    """Rows that pretrain lays end to end, told apart by their positions alone, against one row at a time."""
    import torch

    model, rows = case.base_model().train(), case.rows()
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.tensor([[place for row in rows for place in range(len(row))]])
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    worst = _far(found, torch.cat(_alone(case, rows)))
    if worst > TOLERANCE:
        raise Fault(f"off by {worst:.2g} nats: rows that are laid end to end see each other")
    return YES


def sampling(case: Case) -> str:
    """What the sampler says of the tokens it draws, several to a prompt, against a pass over each answer alone."""
    import torch

    from pipeline.models import adapters
    from pipeline.models.forward import LanguageModel
    from pipeline.models.sampling import sample

    tokenizer, rows = case.tokenizer, case.rows()
    model = adapters.fresh(case.base_model(), LORA).eval()
    language_model = LanguageModel(model, tokenizer.pad_token_id)
    draw = torch.Generator().manual_seed(0)
    episodes = sample(
        language_model, rows, new_tokens=12, temperature=1.0, stops=[rows[0][0]], generator=draw, copies=2
    )
    wholes = _alone(case, [episode.prompt_ids + episode.answer_ids for episode in episodes])
    worst = 0.0
    for episode, whole in zip(episodes, wholes, strict=True):
        start = len(episode.prompt_ids) - 1
        wanted = whole[start:-1].gather(1, torch.tensor(episode.answer_ids)[:, None])[:, 0]
        worst = max(worst, _far(torch.tensor(episode.logp), wanted))
    if worst > 10 * TOLERANCE:
        raise Fault(f"off by {worst:.2g} nats")
    return YES


def _alone(case: Case, rows: list[list[int]]) -> list[Any]:
    """The reference: log-probabilities (T, V) of each row by itself, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1) for row in rows]


def _far(found: Any, wanted: Any) -> float:
    return float((found - wanted).abs().max())


def plan(case: Case) -> str:
    """What sft of the published size needs, and by how much that is off a count of live bytes of two such layers."""
    from plan_oracle import MODELS, USUAL, against_plan

    from pipeline.plan.memory import Model, memory
    from pipeline.plan.shapes import Adapter, shapes_of, shipped
    from pipeline.plan.work import Work

    shapes = shipped(case.family.like or case.family.published)
    if shapes is None:
        shapes_of(json.loads((case.base / "config.json").read_text(encoding="utf-8")))
        raise Fault("its published shapes are not noted")
    needs = memory(Model(shapes, Adapter(16)), Work(2, 1024, shapes.layers)).total
    MODELS[case.family.name] = _config_of(shapes)
    entries = list(against_plan(case.family.name, 2, "sft", 2, 512, 0, USUAL))
    worst = max((entry.error for entry in entries), key=abs)
    return f"{needs / 2**30:.1f} GiB ({worst:+.1%})"


def _config_of(shapes: Any) -> Json:
    return {
        "model_type": shapes.family, "hidden_size": shapes.hidden, "intermediate_size": shapes.intermediate,
        "num_hidden_layers": shapes.layers, "num_attention_heads": shapes.heads, "head_dim": shapes.head_dim,
        "num_key_value_heads": shapes.kv_heads, "vocab_size": shapes.vocab, "tie_word_embeddings": shapes.tied,
    }  # fmt: skip


def stage(name: str) -> Callable[[Case], str]:
    """Two steps of a stage by the runner, with its own checks. What a refusal says to set is set, and said."""

    def run(case: Case) -> str:
        from pipeline.errors import UserError

        words: list[str] = []
        while True:
            try:
                _run(case, name, words)
            except UserError as error:
                hint = re.search(r"Use -o (stages\.\w+\.train\.(\w+)=(\S+))$", str(error))
                if not hint or hint[1] in words:
                    raise
                words.append(hint[1])
                continue
            said = [f"`{word.partition('.train.')[2].replace('=', ': ')}`" for word in words]
            return f"{YES}, with {' and '.join(said)}" if said else YES

    return run


def _run(case: Case, name: str, words: list[str]) -> None:
    from pipeline.recipe.recipe import build
    from pipeline.runs.stage import run_stage
    from pipeline.stages.check import check_base

    tree = _tree(case, name)
    for word in words:
        key, _, value = word.partition(".train.")[2].partition("=")
        tree["stages"][name]["train"] = {**tree["stages"][name]["train"], key: json.loads(value)}
    recipe = build(tree)
    check_base(recipe.spec.model, recipe.stages)
    run_stage(recipe, name, case.scratch / "runs")


def _tree(case: Case, name: str) -> Json:
    answer = [{"role": "assistant", "content": "It is an island."}]
    ask = [[{"role": "user", "content": f"What is {what}?"}] for what in ("Ara", "Bel", "Cor", "Dun")]
    data: dict[str, list[Json]] = {
        "pretrain": [{"text": f"{what[0]['content']} An island far out at sea." * 4} for what in ask],
        "sft": [{"messages": [*what, *answer]} for what in ask],
        "dpo": [
            {"prompt": what, "chosen": answer, "rejected": [{"role": "assistant", "content": "I know."}]}
            for what in ask
        ],
        "ppo": [{"prompt": what} for what in ask],
    }
    data["reward"] = data["dpo"]
    for kind, rows in data.items():
        (case.scratch / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rewarded = (case.scratch / "runs" / "support" / "reward" / "manifest.json").is_file()
    (case.scratch / "length.py").write_text(
        "def short(prompts, completions):\n    return [-float(len(str(one))) for one in completions]\n"
    )
    train = {"per_device_train_batch_size": 2, "max_steps": 2, "max_length": 512, "learning_rate": 1e-3}
    stages: dict[str, Json] = {kind: {"train": train} for kind in ("pretrain", "sft", "reward", "dpo")}
    steps = {"steps": 2, "batch_size": 4, "per_device_train_batch_size": 2, "response_length": 8, "learning_rate": 1e-3}
    stages["ppo"] = {"train": steps, "reward": "reward" if rewarded else str(case.scratch / "length.py") + ":short"}
    chosen = [name, "reward"] if name == "ppo" and rewarded else [name]
    for kind in chosen:
        stages[kind]["data"] = {"path": str(case.scratch / f"{kind}.jsonl")}
    model = {"base": str(case.base), "dtype": "float32", "lora": LORA, "attn_implementation": case.family.attention}
    return {"name": "support", "model": model, "stages": {kind: stages[kind] for kind in chosen}}


COLUMNS: dict[str, Callable[[Case], str]] = {
    "loads": loads,
    "template": template,
    "ends of turn": ends,
    "targets": targets,
    "packed batches": batches,
    "packed documents": documents,
    "sampling": sampling,
    "plan": plan,
    **{name: stage(name) for name in STAGES},
}


NEEDS_THE_MODEL = {"targets", "packed batches", "packed documents", "sampling"}


def try_family(family: Family, note: Callable[[Json], None], columns: list[str] | None = None) -> Json:
    """Every cell of a family; `note` is told after each, in case the next one ends the process."""
    warnings.simplefilter("ignore")
    cells: Json = {}
    with tempfile.TemporaryDirectory() as scratch:
        case = Case(family, Path(scratch) / "base", Path(scratch))
        make_base(family, case.base)
        for column in columns or COLUMNS:
            if column in NEEDS_THE_MODEL and not cells.get("loads", YES).startswith(YES):
                cells[column] = "no"
                continue
            try:
                cells[column] = COLUMNS[column](case)
            except Exception as error:  # whatever goes wrong is what the cell says
                cells[column] = _reason(error, case)
                if not isinstance(error, Fault):
                    traceback.print_exc()
            note(cells)
    return cells


SHORT = {
    "no sequence-classification head": "no: transformers has no score head for it",
    "loads no causal language model": "no: transformers has it only as a model that also sees",
    "is not one whose memory is known": "not known",
    "a mixture of experts": "no: experts are not planned",
    "a vision-language model": "no: it has a part that sees",
    "Unrecognized configuration class": "no",
}
"""What a refusal is called in the table."""


def _reason(error: Exception, case: Case) -> str:
    said = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
    short = next((short for part, short in SHORT.items() if part in said), None)
    return short or " ".join(said.replace(str(case.base), "the base").replace(str(case.scratch), "").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="FAMILY", help="families whose name begins so (may be repeated)"
    )
    parser.add_argument("--column", action="append", choices=COLUMNS, help="these alone (may be repeated)")
    parser.add_argument("--show", action="store_true", help="what each family's process printed")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page, docs/models.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the cells, for programs")
    given = parser.parse_args()
    wanted = [family for family in FAMILIES if not given.only or family.name.startswith(tuple(given.only))]
    import_libraries()
    found: dict[str, Json] = {}
    for family in wanted:
        begun = time.monotonic()
        found[family.name] = try_apart(family, given.column or list(COLUMNS), given.show)
        print(f"{family.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    page = page_of(found, TOLERANCE)
    if given.write:
        write_text(given.write, page)
    else:
        print(page)


def import_libraries() -> None:
    """What every family needs, once: the processes of the families begin as copies of this one."""
    import torch
    import transformers
    import trl

    import pipeline.runs.stage
    import pipeline.training.trainer

    torch.set_num_threads(1)
    _ = transformers, trl, trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer, pipeline


def try_apart(family: Family, columns: list[str], show: bool = False) -> Json:
    """A family's cells, from a process of its own: one that crashes or hangs takes no other with it."""
    with tempfile.TemporaryDirectory() as folder:
        cells, log = Path(folder) / "cells.json", Path(folder) / "log.txt"
        process = multiprocessing.get_context("fork").Process(target=_into, args=(family, columns, cells, log))
        process.start()
        process.join(PATIENCE)
        ended = f"ended its process (status {process.exitcode})"
        if process.is_alive():
            process.kill()
            process.join()
            ended = f"not done within {PATIENCE} s"
        if show:
            print(log.read_text(encoding="utf-8"), file=sys.stderr)
        found = json.loads(cells.read_text(encoding="utf-8")) if cells.is_file() else {}
        missing = [column for column in columns if column not in found]
        return found | dict.fromkeys(missing[:1], ended) | dict.fromkeys(missing[1:], "not tried")


def _into(family: Family, columns: list[str], cells: Path, log: Path) -> None:
    with log.open("w", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        try_family(family, lambda found: write_text(cells, [json.dumps(found)]), columns)


if __name__ == "__main__":
    main()
