"""What the stages trained by TRL share: arguments, the trainer around a frozen base, training with resume, saving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

from pipeline.disk import metrics
from pipeline.disk.atomic import written_whole
from pipeline.errors import BrokenInvariant, Interrupted, UserError
from pipeline.language.say import kept
from pipeline.models import adapters, liger
from pipeline.models.forward import plain_on_cpu
from pipeline.models.out_of_memory import is_out_of_memory
from pipeline.plan.sizes import BATCH, TOKENS
from pipeline.plan.stage import optimizer_bytes
from pipeline.training.head import Head
from pipeline.training.micro_batches import SplitsWhenFull, Trainer
from pipeline.training.progress import Checkpoints, Progress, Stop, note_split, step_of
from pipeline.training.token_batches import TokenBatches, count_tokens

if TYPE_CHECKING:
    from pipeline.stages.stage import Context, StageSpec


COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def arguments(config_class: Any, spec: StageSpec, ctx: Context, **stage_defaults: Any) -> Any:
    """The trainer's config: our defaults and the stage's, then the recipe's arguments, then what only we may say.

    Added to it are `checkpointed_layers`: in how many layers activations are checkpointed, None if in all or none; and
    the budget of a batch in tokens, None if its rows are counted; `layers_compiled`, what torch.compile is told; and
    `by_liger`, whether RMSNorm and SwiGLU are Liger's.
    Raises UserError naming the stage if the config refuses a value.
    """
    given = dict(spec.train)
    budget = given.pop(TOKENS, None)
    layers: Any = given.get("activation_checkpointing")
    counted = isinstance(layers, int) and not isinstance(layers, bool)
    if counted:
        given["activation_checkpointing"] = layers > 0
    # Here it means the decoder layers one by one: all are alike, so one is compiled, and not the model around them.
    compiling = {name: given.pop(name) for name in COMPILING if name in given}
    by_liger = given.pop("use_liger_kernel", False)  # TRL's own use of it takes more than the layers' kernels
    defaults = {
        "bf16": ctx.model.dtype == "bfloat16",
        "fp16": ctx.model.dtype == "float16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},
        "disable_tqdm": True,
        "save_steps": 100,
        **stage_defaults,
    }
    fixed = {
        "output_dir": str(ctx.out.checkpoints),
        "seed": ctx.seed,
        "save_strategy": "steps",
        "eval_strategy": "no",  # the stage evaluates before and after; TRL's mean over batches weighs them unequally
        "save_total_limit": None,  # Checkpoints rotates, after the newest has been marked whole
        "report_to": "none",  # the stage's own trackers are told, by the same words as ppo's
    }
    try:
        args = config_class(**{**defaults, **given, **fixed})
    except (TypeError, ValueError) as error:
        raise UserError(f"stages.{ctx.out.name}.train: {config_class.__name__} refuses it: {error}") from error
    args.checkpointed_layers = layers if counted and layers else None
    args.base_on_hub = ctx.model.public_id
    args.layers_compiled = compiling if compiling.get("torch_compile", bool(compiling)) else None
    args.by_liger = by_liger
    setattr(args, TOKENS, budget)
    return args


def policy(ctx: Context, base: PreTrainedModel) -> PeftModel:
    """The adapter this stage trains: the parent's, or a fresh one for the first of a chain."""
    parent = ctx.parents.get("policy")
    return adapters.carried(base, parent.adapter) if parent else adapters.fresh(base, ctx.model.lora)


def headed(ctx: Context, base: PreTrainedModel) -> PeftModel:
    """The same under a new score head, on a base that was loaded with one."""
    parent = ctx.parents.get("policy")
    return adapters.transplanted(base, parent.adapter) if parent else adapters.fresh(base, ctx.model.lora, head=True)


def compile_layers(model: PeftModel, said: dict[str, Any]) -> None:
    """torch.compile for each decoder layer, for batches of any shape. `said`: the torch_compile words of a recipe.

    A compiled layer and its adapters are PEFT's separate operations, which the compiler puts together itself. Attention
    by a loop over segments is not compiled: every batch would be compiled anew.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(
                dynamic=True,
                backend=said.get("torch_compile_backend") or "inductor",
                mode=said.get("torch_compile_mode"),
            )


def build(trainer_class: type, model: PeftModel, **options: Any) -> Any:
    """A TRL trainer whose adapter is still in float32. Raises UserError for a budget of tokens that it cannot keep to.

    TRL 1.16 rounds a QLoRA adapter to bfloat16 when the trainer is made; at the learning rates of DPO and PPO most
    updates then vanish. The masters are put back before the optimizer is created from them.
    """
    # On a CPU, TRL 1.16 puts every position through the LM head and throws away those without a label. It does so for
    # accelerators that compile anew for each shape, which a CPU does not; on CUDA it leaves them out.
    utils: Any = trl_utils
    utils._use_triton = lambda device: device.type == "cpu" or _use_triton(device)
    utils._ChunkedLogProbFunction = Head
    args = options["args"]
    pairs = "chosen_ids" in options["train_dataset"].column_names
    if getattr(args, TOKENS, None) and pairs and args.world_size > 1:
        raise UserError(
            f"{TOKENS} gives each of {args.world_size} processes another number of pairs, and TRL's trainers gather "
            f"equally many. Say {BATCH} instead, or start one process"
        )
    if getattr(args, "layers_compiled", None) and not torch.cuda.is_available():
        raise UserError(
            "train.torch_compile: it is for GPUs, and there is no GPU here; on a CPU it compiles anew for every batch; "
            "leave it out"
        )
    whole: Any = model.get_base_model()
    text_config = whole.config.get_text_config()
    weight = getattr(args, "router_aux_loss_coef", 0.0)
    weight = getattr(text_config, "router_aux_loss_coef", 0.0) if weight is None else weight
    balanced = weight and hasattr(text_config, "output_router_logits")
    if balanced and not getattr(text_config, "num_experts", None):
        raise UserError(
            f"train.router_aux_loss_coef: TRL cannot compute the experts' balance loss of a {text_config.model_type} "
            f"model. Use -o stages.{Path(args.output_dir).parent.name}.train.router_aux_loss_coef=0.0"
        )
    if getattr(args, "activation_offloading", False) and not torch.cuda.is_available():
        raise UserError("train.activation_offloading: it saves GPU memory, and there is no GPU here; leave it out")
    if args.push_to_hub and args.base_on_hub:  # what TRL pushes names its base, and nobody else has this folder
        model.peft_config["default"].base_model_name_or_path = args.base_on_hub
        model.get_base_model().config._name_or_path = args.base_on_hub  # type: ignore[union-attr]
    if getattr(args, "by_liger", False):
        liger.apply(whole, Path(args.output_dir).parent.name)
    masters = {name: weight.detach().clone() for name, weight in adapters.trainable(model).items()}
    bases = (SplitsWhenFull, ResumableOrder, trainer_class)
    trainer: Any = type(trainer_class.__name__, bases, {})(model=model, **options)
    for name, weight in adapters.trainable(trainer.model).items():
        weight.data = masters[name]
    if compiling := getattr(args, "layers_compiled", None):
        compile_layers(trainer.model, compiling)
    adapters.round_frozen(trainer.model)  # of dpo the reference, to which TRL gives four bytes a parameter
    return trainer


class ResumableOrder(Trainer):  # type: ignore[misc]
    """For a Trainer: `train_sampling_strategy: group_by_length` in an order that depends on seed and epoch alone, and
    batches by a budget of tokens.

    transformers draws that order from the global generator, whose state at the start of an epoch a checkpoint does not
    hold.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        # The dataset given has lost its column of lengths with all others that the model does not take.
        sampler: Any = super()._get_train_sampler(self.train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.__class__ = _SeededByEpoch
            vars(sampler).update(seed=self.args.seed, epoch=0)
        if getattr(self.args, TOKENS, None):
            return TokenBatches(sampler, count_tokens(self.train_dataset), self.args)
        return sampler


class _SeededByEpoch(LengthGroupedSampler):
    seed: int

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()  # type: ignore[no-untyped-call]


class TakesEncoded(Trainer):  # type: ignore[misc]
    """For DPOTrainer and KTOTrainer: rows our encoder has made already; TRL 1.16 has no other way past its own
    tokenization."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        masks = {"chosen_mask", "rejected_mask", "completion_mask", "KL_completion_mask"}
        self._signature_columns: list[str] = list({*self._signature_columns, *masks})


class LearntTokens(DataCollatorForPreference):
    """TRL's collator takes every token after the prompt as the answer's. Of an answer of several messages only the
    assistant's are: `chosen_mask` and `rejected_mask` say which. Rows that do not fit max_length are gone by then."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        masks = [row[key] for key in ("chosen_mask", "rejected_mask") for row in examples]
        for place, (mask, row) in enumerate(zip(masks, [*examples, *examples], strict=True)):
            start = len(row["prompt_ids"])
            batch["completion_mask"][place, start : start + len(mask)] = torch.tensor(mask)
        return batch


def train(trainer: Any, ctx: Context, spec: StageSpec) -> dict[str, Any]:
    """Train to the end, from the last whole checkpoint where there is one, and return cost figures. What has been
    trained already is put in place instead.

    Raises Interrupted after Ctrl-C or SIGTERM, once a checkpoint has been written.
    """
    if ctx.trained:
        adapters.restore(trainer.model, ctx.trained)
        return {}
    checkpoint = ctx.claim()
    set_seed(ctx.seed)
    stop = Stop()
    sizes: list[int] = []

    def note(rows: int, left: int) -> None:
        sizes.append(left)
        note_split(ctx, trainer.state.global_step, rows, left)

    def note_trial(rows: int) -> None:
        step = trainer.state.global_step
        print(f"  step {step + 1}: {rows} rows at once are tried again", flush=True)
        ctx.log(step, {"rows_at_once": rows})

    trainer.when_split, trainer.when_tried = note, note_trial
    trainer.remove_callback(PrinterCallback)  # Progress prints
    trainer.add_callback(stop)
    trainer.add_callback(Checkpoints(ctx.fingerprint, spec.train.get("save_total_limit") or 1))
    trainer.add_callback(Progress(ctx, resumed=checkpoint is not None))
    metrics.rewind(ctx.out.metrics, step_of(checkpoint) if checkpoint else 0)
    try:
        with stop.listening(), plain_on_cpu(trainer.model):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        weights = sum(weight.numel() for weight in adapters.trainable(trainer.model).values())
        state = weights * optimizer_bytes(trainer.args.optim) / 2**20
        raise UserError(
            f"stage '{ctx.out.name}' ran out of memory in step {trainer.state.global_step + 1}, after the passes over "
            f"its rows: most likely in the optimizer's step, whose state takes {state:.0f} MiB from the first step on. "
            "Set optim: adamw_8bit, lower model.lora.r or the size of a batch, or end what else uses the GPU. "
            "Run again to go on from the last checkpoint."
        ) from error
    if stop.requested:
        state = trainer.state
        raise Interrupted(kept("stopped at step {step} of {all}", step=state.global_step, all=state.max_steps))
    if trainer.state.global_step == 0:
        raise UserError(f"stages.{ctx.out.name}.train trains no step: raise num_train_epochs or max_steps")
    loss = output.training_loss
    if not math.isfinite(loss) and not checkpoint:
        raise UserError(f"stage '{ctx.out.name}' ended with a loss of {loss}: lower the learning rate")
    done = {"steps": trainer.state.global_step, "train_seconds": round(output.metrics["train_runtime"], 1)}
    return {**done, "rows_at_once": min(sizes)} if sizes else done


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, ctx: Context) -> None:
    """Write the adapter with its tokenizer and chat template, whole or not at all."""
    if ctx.trained:
        return
    unfit = [name for name, weight in adapters.trainable(model).items() if not torch.isfinite(weight).all()]
    if unfit:
        raise BrokenInvariant(
            "finite adapter weights after training",
            f"{len(unfit)} tensors with NaN or infinity, first {unfit[0]}",
            "too high a learning rate; nothing was saved",
        )
    process = PartialState()
    if process.is_main_process:
        with written_whole(ctx.out.adapter) as folder:
            adapters.save(model, folder)
            tokenizer.save_pretrained(folder)
    process.wait_for_everyone()
