"""Out of memory halves the micro-batch and repeats the same optimizer step; the adapter is what it would have been.

The CPU has no memory limit to run into, so one is planted: a forward pass of more tokens than allowed raises what CUDA
raises, and so does, on occasion, a backward pass that has added part of its gradients.
"""

from __future__ import annotations

import gc
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from conftest import launch_stage, tiny_tree, write_recipe
from safetensors.torch import load_file

from pipeline.data import render
from pipeline.errors import UserError
from pipeline.models import adapters
from pipeline.models import base as bases
from pipeline.models.forward import LanguageModel
from pipeline.models.out_of_memory import ROLLOUT, run_in_parts
from pipeline.models.sampling import sample
from pipeline.ppo.ppo import PPOTrainer
from pipeline.recipe.recipe import build
from pipeline.runs.stage import run_stage
from pipeline.training import sequences
from pipeline.training import trainer as shared
from pipeline.training.micro_batches import SplitsWhenFull, lengths

READY = adapters._ready


def plant(monkeypatch: pytest.MonkeyPatch, tokens: int | None, backward: bool = False) -> None:
    """A model whose passes hold so many tokens at most. With `backward`, a larger one fails only half-way back."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. (planted)")

    def limited(model: Any) -> Any:
        layers = [m for m in READY(model).modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]

        def entered(layer: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            sampling = kwargs.get("past_key_values") is not None
            if sampling or tokens is None or hidden.shape[0] * hidden.shape[1] <= tokens:
                return
            if backward and hidden.requires_grad:
                hidden.register_hook(full)
            elif not backward:
                full()

        # The hook on the last layer's input fires once that layer's adapter has been given its gradients.
        layers[-1].register_forward_pre_hook(entered, with_kwargs=True)
        return model

    monkeypatch.setattr(adapters, "_ready", limited)


def trained(tree: dict[str, Any], runs: Path, stage: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[Any]]:
    recipe = build(tree)
    for name in recipe.order():
        if not (runs / "tiny" / name / "manifest.json").exists():
            run_stage(recipe, name, runs)
    folder = runs / "tiny" / stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "manifest.json").read_text())
    return load_file(folder / "adapter" / "adapter_model.safetensors"), manifest, lines


def tree_of(base: Path, folder: Path, stage: str, **train: Any) -> dict[str, Any]:
    tree = tiny_tree(base, folder)
    tree["model"] |= {"dtype": "float32", "quantize": "none"}
    section = {**tree["stages"][stage]}
    section.pop("from", None)
    section.pop("questions", None)
    steps = {"max_steps": 3, "gradient_accumulation_steps": 2, **train}
    tree["stages"] = {stage: {**section, "train": {**section["train"], **steps}}}
    return tree


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_a_limit_changes_no_adapter(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, backward: bool
) -> None:
    tree = tree_of(tiny_base, tmp_path, stage)
    free, _, unhindered = trained(tree, tmp_path / "free", stage)
    limit = {"pretrain": 300, "sft": 120, "reward": 300, "dpo": 300}[stage]
    plant(monkeypatch, limit, backward)
    limited, manifest, lines = trained(tree, tmp_path / "limited", stage)
    assert manifest["data"]["counts"]["rows_at_once"] < 4
    events = [line for line in lines if "out_of_memory" in line]
    assert events and all(event["rows_at_once"] == event["out_of_memory"] // 2 for event in events)
    assert free.keys() == limited.keys()
    worst = max((free[name] - limited[name]).abs().max().item() for name in free)
    assert worst < 1e-5
    losses = [[line["loss"] for line in told if "loss" in line] for told in (unhindered, lines)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def a_trainer(base: Path, folder: Path, stage: str, **train: Any) -> Any:
    """A stage's trainer as the stage builds it, on an adapter that is no longer the identity."""
    from pipeline.data.contracts import PREFERENCE
    from pipeline.data.load import DataSpec, read_source

    recipe = build(tree_of(base, folder, stage))
    spec, path = recipe.spec.model, recipe.stages[stage].data.path
    tokenizer = bases.load_tokenizer(spec)
    torch.manual_seed(0)
    model = adapters.fresh(
        bases.load_base(spec, tokenizer, num_labels=int(stage == "reward")), spec.lora, stage == "reward"
    )
    with torch.no_grad():
        for weight in adapters.trainable(model).values():
            weight.add_(torch.randn_like(weight) * 0.02)
    some = read_source(path, PREFERENCE, DataSpec(path=path)).rows[:6] if stage != "sft" else []
    if stage == "dpo":
        replies = [[render.reply(tokenizer, row, side) for side in ("chosen", "rejected")] for row in some]
        rows, kind, config = sequences.REPLY_PAIRS.write(replies), trl.DPOTrainer, trl.DPOConfig
        kind = type("DPOTrainer", (shared.TakesEncoded, kind), {})
    elif stage == "reward":
        talks = [[render.conversation(tokenizer, row, side) for side in ("chosen", "rejected")] for row in some]
        rows, kind, config = sequences.SCORED_PAIRS.write(talks), trl.RewardTrainer, trl.RewardConfig
    else:
        said = [json.loads(line) for line in Path(path).read_text().splitlines()[:6]]
        talks = [render.demonstration(tokenizer, row) for row in said]
        rows, kind, config = sequences.TEXTS.write(talks), trl.SFTTrainer, trl.SFTConfig
    args = config(
        output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=6,
        gradient_checkpointing=False, max_length=256, **train,
    )  # fmt: skip
    args.checkpointed_layers = args.base_on_hub = None
    trainer = shared.build(kind, model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 3
    return trainer


def dpo_losses() -> list[dict[str, Any]]:
    source = inspect.getsource(trl.DPOTrainer._compute_loss)
    losses = [loss for loss in re.findall(r'loss_type == "(\w+)"', source) if not loss.startswith("aot")]
    alone: list[dict[str, Any]] = [
        {"loss_type": [loss], **({"label_smoothing": 0.1} if loss in ("exo_pair", "robust") else {})} for loss in losses
    ]
    return [
        *alone,
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"use_weighting": True},
        {"ld_alpha": 0.3},
        {"precompute_ref_log_probs": True},
    ]


WHOLE_IS_SUM = [
    *[("dpo", train) for train in dpo_losses()],
    *[("reward", train) for train in ({}, {"center_rewards_coefficient": 0.3})],
    *[("sft", train) for train in ({}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.1}, {"packing": True})],
]


@pytest.mark.parametrize(("stage", "train"), WHOLE_IS_SUM, ids=lambda value: str(value).translate({ord("'"): None}))
def test_the_gradients_of_parts_are_those_of_the_whole(
    tiny_base: Path, tmp_path: Path, stage: str, train: dict[str, Any]
) -> None:
    trainer = a_trainer(tiny_base, tmp_path, stage, **train)
    batch = next(iter(trainer.get_train_dataloader()))
    labelled = (batch["labels"] != -100).sum() if "labels" in batch else None
    for items in {None, labelled} if stage == "sft" else {None}:  # of all the step's tokens, or of this batch's own
        found = {}
        for at_once in (None, 4, 1):  # parts of unequal size, then rows alone
            trainer.rows_at_once = at_once
            loss = trainer.training_step(trainer.model, dict(batch), items)
            weights = adapters.trainable(trainer.model)
            found[at_once] = {"loss": loss, **{name: weight.grad.clone() for name, weight in weights.items()}}
            trainer.model.zero_grad()
        largest = max(gradient.abs().max().item() for gradient in found[None].values())
        for at_once in (4, 1):
            worst = max((found[None][name] - found[at_once][name]).abs().max().item() for name in found[None])
            assert worst < 2e-5 * max(1.0, largest), (at_once, items)


@pytest.mark.parametrize(
    ("stage", "train", "why"),
    [
        ("dpo", {"loss_type": ["aot"]}, "loss_type aot compares all pairs of a batch"),
        ("dpo", {"loss_type": ["sft"], "use_weighting": True}, "use_weighting multiplies a mean over tokens"),
        ("sft", {"packing": True, "neftune_noise_alpha": 5.0}, "neftune_noise_alpha scales its noise with the length"),
    ],
)
def test_a_loss_that_is_no_sum_over_rows_is_refused_by_name(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, train: dict[str, Any], why: str
) -> None:
    plant(monkeypatch, 40)
    trainer = a_trainer(tiny_base, tmp_path, stage, **train)
    with pytest.raises(UserError, match=f"out of memory with 6 rows at once, .*{why}.* Halve per_device_train_batch"):
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_routers_loss_is_not_added_once_a_part(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A mixture of experts: its load-balancing loss is one of the whole batch. Without that loss the parts add up."""
    experts = mixture_of_experts(tiny_base, tmp_path / "experts")
    trainer = a_trainer(experts, tmp_path, stage, router_aux_loss_coef=0.0)
    batch, found = next(iter(trainer.get_train_dataloader())), []
    for at_once in (None, 1):
        trainer.rows_at_once = at_once
        trainer.training_step(trainer.model, dict(batch), torch.tensor(100) if stage == "sft" else None)
        found.append({name: weight.grad.clone() for name, weight in adapters.trainable(trainer.model).items()})
        trainer.model.zero_grad()
    assert max((found[0][name] - found[1][name]).abs().max().item() for name in found[0]) < 2e-5
    plant(monkeypatch, 40)
    trainer = a_trainer(experts, tmp_path, stage, router_aux_loss_coef=0.5)
    with pytest.raises(
        UserError, match="the router's loss .* is computed over the whole batch .router_aux_loss_coef: 0"
    ):
        trainer.training_step(trainer.model, dict(batch))


def test_offloaded_activations_are_not_done_in_parts_nor_without_a_gpu(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's context of offloading needs a GPU to be made, so its word is set once the trainer is."""
    with pytest.raises(UserError, match="train.activation_offloading: it saves GPU memory, and there is no GPU here"):
        a_trainer(tiny_base, tmp_path, "sft", activation_offloading=True)
    plant(monkeypatch, 40)
    trainer = a_trainer(tiny_base, tmp_path, "sft")
    trainer.args.activation_offloading = True
    with pytest.raises(UserError, match="activation_offloading has no way to drop .* Halve per_device_train_batch"):
        trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))


def mixture_of_experts(like: Path, folder: Path) -> Path:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def test_the_longest_batch_is_tried_first(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing behind: the adapter is the one of a run that tried nothing."""
    tree = tree_of(tiny_base, tmp_path, "sft")
    free, _, _ = trained(tree, tmp_path / "free", "sft")
    monkeypatch.setattr(SplitsWhenFull, "probes", True)
    plant(monkeypatch, 200)
    probed, _, lines = trained(tree, tmp_path / "probed", "sft")
    assert [line["step"] for line in lines if "out_of_memory" in line] == [0]
    assert max((free[name] - probed[name]).abs().max().item() for name in free) < 1e-5


def test_the_first_try_leaves_room_for_what_the_first_step_makes(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the longest batch is tried, as many bytes are held as the optimizer's state and gradients take later."""
    trainer = a_trainer(tiny_base, tmp_path, "reward", gradient_accumulation_steps=2, max_steps=1)
    held: list[int] = []
    random_state = torch.get_rng_state().numel()  # bytes as well, put aside while it is tried

    def look(*_: Any) -> None:
        found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.dtype is torch.uint8]
        held.append(sum(thing.numel() for thing in found if thing.numel() != random_state))

    trainer.model.get_input_embeddings().register_forward_pre_hook(look)
    trainer.probes = True
    trainer.train()
    state = [thing for of in trainer.optimizer.state.values() for name, thing in of.items() if name != "step"]
    gradients = sum(weight.numel() * 4 for weight in adapters.trainable(trainer.model).values())
    made = sum(thing.numel() * thing.element_size() for thing in state)
    assert made > 0 and held[0] == made + gradients
    assert set(held[1:]) == {0}, "only while it is tried"
    assert trainer._room_for_later(trainer.model)[0].numel() == 4 * next(iter(state)).numel(), "the state is there now"


def test_the_longest_rows_are_found_without_reading_tokens(tiny_base: Path, tmp_path: Path) -> None:
    for stage, train in (("sft", {}), ("sft", {"packing": True}), ("reward", {}), ("dpo", {})):
        rows = a_trainer(tiny_base, tmp_path, stage, **train).train_dataset
        plain = [
            len(row["input_ids"])
            if "input_ids" in row
            else len(row.get("prompt_ids", [])) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            for row in rows
        ]
        assert lengths(rows).tolist() == plain


def test_memory_that_runs_out_in_the_optimizers_step_says_what_to_set(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: _always_full(None))
    with pytest.raises(
        UserError, match=r"in step 1, .* optimizer's step, whose state takes \d+ MiB .* optim: adamw_8bit"
    ):
        trained(tree_of(tiny_base, tmp_path, "sft"), tmp_path, "sft")


def test_memory_that_was_full_for_a_moment_is_tried_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many steps; where it stays full, after twice as many each time. No adapter is changed by it."""
    monkeypatch.setattr(SplitsWhenFull, "patience", 2)

    def run(full_passes: int) -> tuple[list[tuple[int, int, int]], dict[str, torch.Tensor]]:
        trainer = a_trainer(tiny_base, tmp_path, "reward", max_steps=8, learning_rate=1e-3)
        left, events = [full_passes], []

        def entered(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            if len(inputs["input_ids"]) > 6 and left[0]:  # chosen and rejected rows
                left[0] -= 1
                _always_full(None)

        trainer.model.get_base_model().model.register_forward_pre_hook(entered, with_kwargs=True)
        trainer.when_split = lambda rows, less: events.append((trainer.state.global_step, rows, less))
        trainer.when_tried = lambda rows: events.append((trainer.state.global_step, 0, rows))
        trainer.train()
        return events, {name: weight.detach() for name, weight in adapters.trainable(trainer.model).items()}

    none, free = run(0)
    once, briefly = run(1)
    always, full = run(10**9)
    assert none == [] and once == [(0, 6, 3), (2, 0, 6)]
    assert always == [(0, 6, 3), (2, 0, 6), (2, 6, 3), (6, 0, 6), (6, 6, 3)]
    for limited in (briefly, full):
        assert max((free[name] - limited[name]).abs().max().item() for name in free) < 1e-4


def test_a_row_too_long_says_what_to_change(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, 40, backward=True)
    with pytest.raises(UserError, match=r"one row of \d+ tokens .* Lower max_length to \d+, or set activation_checkpo"):
        trained(tree_of(tiny_base, tmp_path, "sft"), tmp_path, "sft")


PAYS = """
def pays(completions, **columns):
    return [float(len(c[0]["content"]) % 7) for c in completions]
"""


@pytest.mark.parametrize("critic", ["trunk", "adapter"])
def test_a_limit_changes_no_ppo_policy(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, critic: str
) -> None:
    (tmp_path / "pays.py").write_text(PAYS)
    rows = [
        {"prompt": [{"role": "user", "content": f"say {word}"}]} for word in ("a", "hundred words", "no", "yes it is")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = tiny_tree(tiny_base, tmp_path)
    tree["model"] |= {"dtype": "float32", "quantize": "none"}
    tree["train"] = {}
    tree["stages"] = {
        "ppo": {
            "data": {"path": str(tmp_path / "prompts.jsonl")},
            "reward": f"{tmp_path}/pays.py:pays",
            "train": {
                "steps": 2, "batch_size": 8, "mini_batch_size": 8, "per_device_train_batch_size": 4, "critic": critic,
                "response_length": 12, "kl_stop": 1000.0, "gradient_checkpointing": False,
            },
        }
    }  # fmt: skip
    free, _, _ = trained(tree, tmp_path / "free", "ppo")
    for backward in (False, True):
        runs = tmp_path / f"limited-{backward}"
        plant(monkeypatch, 80, backward)
        monkeypatch.setattr(PPOTrainer, "probes", True)
        limited, manifest, lines = trained(tree, runs, "ppo")
        assert [line["step"] for line in lines if "out_of_memory" in line][0] == 0, "found before the first step"
        assert manifest["data"]["counts"]["rows_at_once"] in (1, 2)
        assert max((free[name] - limited[name]).abs().max().item() for name in free) < 1e-5


def test_two_processes_accumulate_to_one_adapter(tiny_base: Path, tmp_path: Path) -> None:
    """Gradients of earlier micro-batches must be there when DDP averages."""
    tree = tree_of(tiny_base, tmp_path, "sft", per_device_train_batch_size=2, max_steps=2)
    alone, _, _ = trained({**tree, "stages": {"sft": _accumulating(tree, 4)}}, tmp_path / "one", "sft")
    path = write_recipe(tree, tmp_path / "two.yaml")
    launch_stage(2, path, "sft", tmp_path / "two")
    folder = tmp_path / "two" / "tiny" / "sft"
    found = json.loads((folder / "manifest.json").read_text())["invariants"]
    assert found["processes"] == 2 and found["adapters_equal_on_all_processes"]
    together = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert max((alone[name] - together[name]).abs().max().item() for name in alone) < 1e-5


def _accumulating(tree: dict[str, Any], times: int) -> dict[str, Any]:
    section = tree["stages"]["sft"]
    return {**section, "train": {**section["train"], "gradient_accumulation_steps": times}}


def test_a_rollout_is_sampled_on_in_smaller_batches(tiny_base: Path) -> None:
    """The answers are those that one large batch gives."""
    spec = build(tree_of(tiny_base, tiny_base, "sft")).spec.model
    tokenizer = bases.load_tokenizer(spec)
    language_model = LanguageModel(adapters.fresh(bases.load_base(spec, tokenizer), spec.lora), tokenizer.pad_token_id)
    prompts = [list(range(20, 23 + i)) for i in range(9)]
    tried: list[int] = []
    told: list[tuple[int, int]] = []
    limit = 9

    def entered(_: Any, args: Any) -> None:
        if args[0].shape[1] > 1:  # a batch's prompts
            tried.append(len(args[0]))
            if len(args[0]) > limit:
                _always_full(None)

    def answers() -> list[list[int]]:
        draw = torch.Generator().manual_seed(3)
        options = {"new_tokens": 4, "temperature": 1.0, "stops": [-1], "advice": ROLLOUT}
        note = lambda *pair: told.append(pair)  # noqa: E731
        return [e.answer_ids for e in sample(language_model, prompts, generator=draw, when_split=note, **options)]  # type: ignore[arg-type]

    language_model.model.get_input_embeddings().register_forward_pre_hook(entered)
    whole = answers()
    limit = 2
    assert answers() == whole and told == [(9, 4), (4, 2)]
    assert tried == [9, 9, 4, 2, 2, 2, 2, 1]
    limit = 0
    with pytest.raises(UserError, match="one row of 7 tokens .* Lower response_length"):
        answers()


def _always_full(_: Any) -> list[Any]:
    raise torch.OutOfMemoryError("CUDA out of memory. (planted)")


def test_evaluation_in_parts_gives_the_same_numbers_in_the_same_order() -> None:
    ran: list[int] = []

    def run(items: Any) -> list[int]:
        if len(items) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. (planted)")
        ran.append(len(items))
        return [item * item for item in items]

    def of(items: Any) -> list[int]:
        return [value for part in run_in_parts(run, items, lambda item: item) for value in part]

    assert of(range(11)) == [item * item for item in range(11)] and ran == [2, 2, 2, 2, 2, 1]
    assert of([]) == []
    with pytest.raises(UserError, match="one row of 11 tokens does not fit .* over 5 tokens"):
        run_in_parts(_always_full, [11], lambda item: item)
    with pytest.raises(ValueError):
        run_in_parts(lambda items: int("x"), [1, 2], lambda item: item)
