"""The frozen base: loaded one way for every stage, its bytes countable."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

from pipeline.data.tokens import stop_ids
from pipeline.disk.atomic import sha256_of_file, written_whole
from pipeline.errors import UserError
from pipeline.models import packing, varlen
from pipeline.models.forward import score_by_length
from pipeline.models.spec import ModelSpec, cache_folder, pinned

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with the recipe's chat template where it names one and a pad token in any case."""
    spec = pinned(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_folder(spec), revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # a damaged file fails in as many ways as there are file formats
        raise UserError(f"model.base: the tokenizer of {spec.base} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.base: the tokenizer of {spec.base} has no end-of-sequence token, so nothing can stop")
    if spec.chat_template:
        tokenizer.chat_template = Path(spec.chat_template).read_text(encoding="utf-8")
        _knows_the_marks(tokenizer, spec)
    elif not tokenizer.chat_template:
        # Of tokens that the base has: ChatML's marks, or else names for the roles and the end-of-sequence token.
        is_chatml = set(CHATML) <= tokenizer.get_vocab().keys()
        tokenizer.chat_template = CHATML_TEMPLATE if is_chatml else PLAIN_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


CHATML = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
PLAIN_TEMPLATE = """{{ bos_token or '' }}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}
{%- else -%}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""
MARK = re.compile(r"<[|｜][^<>{}\s'\"]+?[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")


def _knows_the_marks(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> None:
    """Raises UserError if the recipe's template writes marks that the base has no token for. As pieces of text they
    would mean nothing to it. As new tokens they would need embeddings, which a frozen 4-bit base cannot grow."""
    vocabulary = tokenizer.get_vocab()
    unknown = sorted({mark for mark in MARK.findall(tokenizer.chat_template) if mark not in vocabulary})
    if unknown:
        raise UserError(
            f"model.chat_template: {spec.chat_template} writes {', '.join(unknown)}, which {spec.base} has no token "
            "for, and a frozen 4-bit base cannot get new ones. Leave chat_template out: then OneBase uses a template "
            "of tokens that the base has"
        )


def load_base(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, num_labels: int = 0) -> PreTrainedModel:
    """The base with every weight frozen; with `num_labels`, under a score head of so many in place of the LM head.

    The new score head is drawn from torch's generator: seed before the call. Scores are read by length, in float32.
    """
    spec = pinned(spec)
    dtype = getattr(torch, spec.computes_in)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if (
        device.type == "cuda"
        and dtype is torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"model.dtype: {torch.cuda.get_device_name(device)} cannot compute in bfloat16; use -o model.dtype=float16"
        )
    if device.type == "cpu" and dtype is torch.float16:
        raise UserError("model.dtype: a CPU does not train in float16; use -o model.dtype=bfloat16 or float32")
    kind: Any = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
    packed = packs(spec, kind, device)
    options: dict[str, Any] = {
        "revision": spec.revision,
        "dtype": dtype,
        "device_map": {"": device},
        "attn_implementation": packing.NAME if packed else spec.attn_implementation,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    if spec.quantization:
        options["quantization_config"] = BitsAndBytesConfig(**spec.quantization)  # type: ignore[no-untyped-call]
    try:
        if num_labels:
            if text_config := _of_the_language_model(spec):
                text_config.num_labels = num_labels
                options["config"] = text_config
            else:
                options["num_labels"] = num_labels
        else:
            # In place of the base's own, whose penalties and suppressed tokens no stage is trained or measured with.
            tokens = {"eos_token_id": stop_ids(tokenizer), "pad_token_id": tokenizer.pad_token_id}
            options["generation_config"] = GenerationConfig(**tokens)  # type: ignore[no-untyped-call]
        model, info = kind.from_pretrained(local_folder(spec), **options)
    except Exception as error:  # a damaged file fails in as many ways as there are file formats
        if "out of memory" in str(error).lower():
            raise
        if "_attention" in str(error) and "not support" in str(error):
            raise UserError(
                f"model.attn_implementation: {spec.base} has no {spec.attn_implementation} attention in transformers. "
                "Use -o model.attn_implementation=eager"
            ) from error
        raise UserError(f"model.base: {spec.base} cannot be loaded: {type(error).__name__}: {error}") from error
    missing = [name for name in info["missing_keys"] if not name.startswith("score.")]
    if missing or info["mismatched_keys"]:
        wrong = [*missing, *(str(key) for key in info["mismatched_keys"])]
        raise UserError(
            f"model.base: the weights of {spec.base} do not fit the model that its config.json describes: "
            f"{len(wrong)} tensors are missing or of another shape, first {wrong[0]}"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"model.base: the tokenizer has {len(tokenizer)} tokens, the base only "
            f"{model.get_input_embeddings().num_embeddings} embeddings; a frozen 4-bit base cannot get new ones"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    keep_gradients_on_cpu(model)
    if num_labels:
        score_by_length(model)
    if packed:
        packing.pack_inside(model)
    frozen: PreTrainedModel = model.requires_grad_(False)
    return frozen


def _of_the_language_model(spec: ModelSpec) -> PretrainedConfig | None:
    """The text part of a config, where the language model is of that alone, so that a reward model is of the same
    layers; None where both are of the whole."""
    config = AutoConfig.from_pretrained(local_folder(spec), revision=spec.revision)
    text_config, language_models = config.get_text_config(), AutoModelForCausalLM._model_mapping
    if type(config) is type(text_config) or type(text_config) not in language_models:
        return None
    same = language_models[type(config)] is language_models[type(text_config)]
    return text_config if same else None


def packs(spec: ModelSpec, kind: Any, device: torch.device) -> bool:
    """Whether batches are computed without padding: on a CPU wherever they can be, on CUDA, where that has not been
    measured, if the recipe asks for it. Raises UserError where it asks and they cannot be.

    kind: the class of transformers' that the base is loaded with.
    """
    asked = spec.attn_implementation == packing.NAME
    if not asked and not (device.type == "cpu" and spec.attn_implementation == "sdpa"):
        return False
    config = load_config(spec)
    why_not = "" if packing.can_pack(config, kind) else "its layers do more to a row than attend to it"
    if device.type == varlen.DEVICE:
        why_not = why_not or varlen.why_not(config, getattr(torch, spec.dtype), device)
    if asked and why_not:
        raise UserError(
            f"model.attn_implementation: {packing.NAME} does not work for {spec.base}: {why_not}. "
            "Use -o model.attn_implementation=sdpa"
        )
    return not why_not


def keep_gradients_on_cpu(model: torch.nn.Module) -> None:
    """Stop bitsandbytes 0.50 from repacking 4-bit weights on CPUs with AVX512-BF16.

    There the first forward in eval mode repacks a layer for a kernel that has no backward, and from then on no
    gradient passes through it, with only a warning. The unpacked weights serve both modes.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def computing(model: Any) -> Iterator[None]:
    """Compute as in training: in the base's dtype, with the float32 adapter cast on the fly."""
    weight = model.get_input_embeddings().weight
    with torch.autocast(weight.device.type, dtype=weight.dtype, enabled=weight.dtype is not torch.float32):
        yield


def frozen_digest(model: Any) -> str:
    """sha256 over the bytes of the frozen trunk in memory, adapters and heads left out.

    Equal before and after a stage, and equal between stages: the trunk is the same under a score head.
    """
    total = hashlib.sha256()
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, weight in sorted(getattr(whole, whole.base_model_prefix).named_parameters()):
        if "lora_" in name or "modules_to_save" in name:
            continue
        total.update(name.replace(".base_layer", "").encode())
        total.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """What the base's config.json says of its language model, without its weights."""
    try:
        config = AutoConfig.from_pretrained(local_folder(spec), revision=spec.revision)
    except Exception as error:  # a damaged file fails in as many ways as there are file formats
        raise UserError(f"model.base: {spec.base} cannot be loaded: {type(error).__name__}: {error}") from error
    text_config: PretrainedConfig = config.get_text_config()
    return text_config


def local_folder(spec: ModelSpec) -> str:
    """What transformers loads the base from: `base` as the recipe has it. A .gguf file is converted once."""
    if not spec.base.endswith(".gguf"):
        return spec.base
    folder = cache_folder() / "gguf" / sha256_of_file(Path(spec.base))[:16]
    if not (folder / "config.json").is_file():
        from_gguf(Path(spec.base), folder)
    return str(folder)


def from_gguf(file: Path, folder: Path) -> None:
    """Convert a .gguf file into an ordinary model folder (bfloat16 safetensors, tokenizer, chat template)."""
    from transformers import GgufConfig

    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**options)
        model = AutoModelForCausalLM.from_pretrained(
            **options, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read as a GGUF model: {error}") from error
    with written_whole(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
