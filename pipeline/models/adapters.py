"""The ways in which an adapter comes onto the base. The trained adapter is always called `default`.

fresh(base, lora)                the first stage: a new adapter that starts as the identity
carried(base, parent)            sft, dpo: the parent's adapter, trained on from where it stands
transplanted(base, parent, ...)  reward: the parent's trunk under a score head; only the head is new
twin(model, name)                ppo: the policy's adapter once more, as reference
as_trained(base, folder)         publish: a finished adapter, frozen, with its score head in float32 if it has one
borrowed(model, name, folder)    ppo: a further stage's adapter on the policy's base; gives back a reward model's head
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import save_and_load
from safetensors.torch import load_file

from pipeline.disk.artifact import WEIGHTS
from pipeline.errors import BrokenInvariant, UserError
from pipeline.models.lora import fuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "score"

# At every save PEFT would ask the Hub for the base's vocabulary, at the branch's present commit and not at the one that
# is trained on; where they differ it would write the embeddings along. A frozen base's vocabulary never grows.
save_and_load.check_file_exists_on_hf_hub = lambda *_, **__: False  # type: ignore[attr-defined]


def fresh(base: PreTrainedModel, lora: dict[str, Any], head: bool = False) -> PeftModel:
    """A new adapter. Raises UserError if PEFT refuses its description."""
    if lora.get("target_modules") == "all-linear" and not lora.get("exclude_modules"):
        lora = {**lora, "exclude_modules": _unread(base) or None}
    try:
        return _ready(get_peft_model(base, LoraConfig(**lora, **_task(head))))
    except (TypeError, ValueError) as error:
        raise UserError(f"model.lora: PEFT refuses it: {error}") from error


def carried(base: PreTrainedModel, parent: Path) -> PeftModel:
    """The parent's adapter, trainable, proven to be the one on disk."""
    model = _ready(PeftModel.from_pretrained(base, str(parent), is_trainable=True))
    prove_same(model, parent)
    return model


def transplanted(base: PreTrainedModel, parent: Path) -> PeftModel:
    """The parent's adapter under a new score head.

    peft's own loader fails on an adapter without a head, so the trunk's tensors are laid in by name.
    """
    config = LoraConfig.from_pretrained(str(parent))
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [HEAD], False
    model = _ready(get_peft_model(base, config))
    _lay_in(model, parent, "default")
    prove_same(model, parent, head=False)
    return model


def as_trained(base: PreTrainedModel, folder: Path) -> PeftModel:
    """A finished stage's adapter, frozen, bit for bit as it is on disk. It is computed by PEFT's own operations, as by
    whoever loads what is published: in 16 bits ours round otherwise."""
    model = _ready(PeftModel.from_pretrained(base, str(folder), is_trainable=True), fused=False)
    _lay_in(model, folder, "default")  # PEFT has rounded a reward model's head to the base's dtype
    prove_same(model, folder)
    return model.requires_grad_(False)


def twin(model: PeftModel, name: str, trainable: bool = False) -> None:
    """A copy of the policy's adapter as it stands, under another name."""
    tensors = get_peft_model_state_dict(model, adapter_name="default")
    _beside(model, name, copy.deepcopy(model.peft_config["default"]), tensors, trainable)


def borrowed(model: PeftModel, name: str, folder: Path, trainable: bool = False) -> torch.Tensor | None:
    """A finished stage's adapter on the policy's base, under a name, and its score heads (K, hidden) if it has any."""
    tensors = load_file(folder / WEIGHTS)
    head = [tensors.pop(key) for key in list(tensors) if f".{HEAD}." in key]
    _beside(model, name, LoraConfig.from_pretrained(str(folder)), tensors, trainable)
    return head[0] if head else None


def _beside(model: PeftModel, name: str, config: Any, tensors: dict[str, torch.Tensor], trainable: bool) -> None:
    """One more adapter on the policy's base. A frozen one is held in the base's dtype, to which autocast would round
    it at each use anyway."""
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, not trainable
    model.add_adapter(name, config)
    own = _weights_of(model, name)
    unplaced = sorted(tensors.keys() ^ own.keys())
    if unplaced:
        raise BrokenInvariant(
            f"every tensor of the adapter '{name}' to have its place on the policy's base",
            f"{len(unplaced)} that have none or are missing, first {unplaced[0]}",
            "an adapter for another architecture or for other target modules",
        )
    compute = model.get_input_embeddings().weight.dtype
    for key, weight in own.items():
        rounded = not trainable and (".lora_A." in key or ".lora_B." in key)
        weight.data = tensors[key].to(weight.device, compute if rounded else torch.float32, copy=True)
        weight.requires_grad_(trainable)
    _without_cast(model)
    fuse(model)


def round_frozen(model: PeftModel) -> None:
    """Hold the matrices of frozen adapters in the base's dtype, to which autocast would round them at each use."""
    compute = model.get_input_embeddings().weight.dtype
    for name, weight in model.named_parameters():
        if not weight.requires_grad and (".lora_A." in name or ".lora_B." in name):
            weight.data = weight.data.to(compute)


def restore(model: PeftModel, folder: Path) -> None:
    """Put a finished adapter (and its head) in the place of the one that is trained, proven to be the one on disk."""
    _lay_in(model, folder, "default")
    prove_same(model, folder)


def others(model: PeftModel) -> list[str]:
    """The adapters beside the trained one."""
    return [name for name in model.peft_config if name != "default"]


def reloaded(model: PeftModel, folder: Path, name: str) -> None:
    """An adapter from disk beside the trained one, under another name, its score head in float32 as it was saved."""
    model.load_adapter(str(folder), adapter_name=name)
    for weight in _weights_of(model, name).values():
        weight.data = weight.data.float()
    # PEFT makes the new head in the base's dtype and rounds what it loads into it.
    _lay_in(model, folder, name)


def save(model: PeftModel, folder: Path) -> None:
    """Write the trained adapter (and a reward model's head), and prove that the file holds what is in memory."""
    model.save_pretrained(str(folder), selected_adapters=["default"], safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # a card that describes nothing; publishing writes a real one
    prove_same(model, folder)


def prove_same(model: PeftModel, folder: Path, head: bool = True) -> None:
    """Every adapter tensor in memory equals the one on disk, bit for bit, and there are no others."""
    ours = get_peft_model_state_dict(model, adapter_name="default")
    theirs = load_file(folder / WEIGHTS)
    if not head:
        ours = {name: tensor for name, tensor in ours.items() if f".{HEAD}." not in name}
    differing = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours or name not in theirs or not torch.equal(ours[name].cpu(), theirs[name])
    ]
    if differing:
        raise BrokenInvariant(
            f"the adapter in memory to equal {folder / WEIGHTS} in all {len(theirs)} tensors",
            f"{len(differing)} that differ, first {differing[0]}",
            "an adapter loaded under another name or dtype, or onto a model of another architecture",
        )


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _lay_in(model: PeftModel, folder: Path, adapter: str) -> None:
    """Copy every tensor of an adapter on disk onto the one in memory, by name."""
    own = _weights_of(model, adapter)
    with torch.no_grad():
        for name, tensor in load_file(folder / WEIGHTS).items():
            if name not in own:
                raise BrokenInvariant(
                    f"a place in the model for {name} of {folder}",
                    "none",
                    "an adapter that also trains the LM head or the embeddings, which a reward model does not have",
                )
            own[name].copy_(tensor)


def _ready(model: PeftModel, fused: bool = True) -> PeftModel:
    """Float32 masters: in bfloat16 an update of 1e-6 is below the rounding of most weights and vanishes."""
    for weight in trainable(model).values():
        weight.data = weight.data.float()
    _without_cast(model)
    if fused:
        fuse(model)
    return model


def _without_cast(model: PeftModel) -> None:
    """Autocast already casts what a float32 adapter is given; PEFT's own cast would keep a second copy of it."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def _unread(base: PreTrainedModel) -> list[str]:
    """The linear layers of a trunk that no text passes through: of a model that also sees or hears, its towers."""
    trunk, decoder = getattr(base, base.base_model_prefix), base.get_decoder()  # type: ignore[no-untyped-call]
    if decoder is None or not any(module is decoder for module in trunk.modules()):
        return []
    read = {id(module) for module in decoder.modules()}
    return [
        name for name, module in trunk.named_modules() if isinstance(module, torch.nn.Linear) and id(module) not in read
    ]


def _task(head: bool) -> dict[str, Any]:
    return {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]} if head else {"task_type": "CAUSAL_LM"}


def _weights_of(model: PeftModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's weights in memory, by the names that PEFT writes to disk."""
    return {
        name.replace(f".modules_to_save.{adapter}.", ".").replace(f".{adapter}.", "."): weight
        for name, weight in model.named_parameters()
        if f".{adapter}." in name
    }
