"""The model families of docs/models.md: how each one's architecture, special tokens and chat template look.

Sizes are tiny; what makes an architecture itself (layer types, windows, caps, experts, biases, tied embeddings, the
wrapper that a text model is published in) is as published. Chat templates come from the installed TRL where it has the
family's, else from here: they write the same marks and nothing more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Config = dict[str, Any]
VOCABULARY = 640
TINY: Config = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
VISION: Config = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
CHATML = ("<|im_start|>", "<|im_end|>")
THOUGHT = "<think>\n\n</think>\n\n"
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}
{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
{%- elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
SMOLLM3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' + m.content }}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"""
GRANITE = """{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}
{{- '<|end_of_text|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
OLMO2 = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}
{%- if m.role != 'assistant' %}{{ '\n' }}{% else %}{{ eos_token + ('' if loop.last else '\n') }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
OLMO3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- if loop.last and m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PHI4 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""
PHI4_MINI = """{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""
GLM4 = "recipes/templates/glm4.jinja"


@dataclass(frozen=True)
class Family:
    name: str
    """As the table has it."""
    model_type: str
    architecture: str
    """The class that the published weights are of."""
    published: str
    """A typical model's Hub id."""
    template: str
    """Name of TRL's file, or a file of ours, or a template."""
    marks: tuple[str, ...]
    """Special tokens of the tokenizer, its beginning and end of sequence among them."""
    eos: str
    says: tuple[str, str]
    """What the assistant is taught to say in a turn before others and in the last turn; {} is the content."""
    config: Config = field(default_factory=dict)
    words: tuple[str, ...] = ()
    """Tokens of their own that are not special, so that they may stand in what is said."""
    bos: str | None = None
    attention: str = "sdpa"
    text: bool = False
    """The sizes belong to the text part of a wrapper."""
    like: str = ""
    """A Hub id of the same shapes that pipeline/plan knows, where it does not know this one."""

    @property
    def slug(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.name.lower()).strip("-")

    @property
    def ends(self) -> set[str]:
        """The marks that end a turn: what is said after the content, white space apart."""
        return {said.partition("{}")[2].split("\n")[0] for said in self.says} - {""}

    def tiny(self, ids: Config) -> Config:
        """The config's words. `ids`: of the special tokens."""
        own = {key: value for key, value in {**TINY, **ids, **self.config}.items() if value is not None}
        if not self.text:
            return own
        outer = {key: own.pop(key) for key in list(own) if key.startswith(("vision_", "image_"))}
        return {"text_config": own, **outer}


LLAMA_MARKS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
)  # fmt: skip
QWEN_MARKS = ("<|endoftext|>", *CHATML)
QWEN_WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
GEMMA_MARKS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>")
GEMMA4_MARKS = (
    "<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", "<|image|>", "<|audio|>", "<|video|>", '<|"|>', "<|think|>",
)  # fmt: skip
MISTRAL_MARKS = ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
GRANITE_MARKS = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
GLM_MARKS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
DEEPSEEK_MARKS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
OLMO_MARKS = ("<|endoftext|>", *CHATML)
LFM_MARKS = (
    "<|startoftext|>", "<|pad|>", *CHATML, "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_list_start|>",
    "<|tool_list_end|>",
)  # fmt: skip
GPT_OSS_MARKS = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>",
    "<|call|>", "<|constrain|>",
)  # fmt: skip
IM_END = ("{}<|im_end|>", "{}<|im_end|>")
THOUGHTFUL = ("{}<|im_end|>", THOUGHT + "{}<|im_end|>")
LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR: Config = {
    "initializer_range": 0.1,
    "layer_types": ["linear_attention", FULL], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
QWEN_VISION: Config = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
    "num_position_embeddings": 16,
}  # fmt: skip
EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES = [
    Family(
        "Llama 3.x", "llama", "LlamaForCausalLM", "meta-llama/Llama-3.1-8B-Instruct", "llama3_1", LLAMA_MARKS,
        "<|eot_id|>", ("{}<|eot_id|>", "{}<|eot_id|>"), {"rope_parameters": LLAMA_ROPE}, bos="<|begin_of_text|>",
    ),
    Family(
        "Qwen 2.5", "qwen2", "Qwen2ForCausalLM", "Qwen/Qwen2.5-7B-Instruct", "qwen2_5", QWEN_MARKS, "<|im_end|>",
        IM_END, {"head_dim": None}, QWEN_WORDS,
    ),
    Family(
        "Qwen 3", "qwen3", "Qwen3ForCausalLM", "Qwen/Qwen3-8B", "qwen3", QWEN_MARKS, "<|im_end|>", THOUGHTFUL,
        words=QWEN_WORDS,
    ),
    Family(
        "Qwen 3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", "Qwen/Qwen3-30B-A3B", "qwen3", QWEN_MARKS, "<|im_end|>",
        THOUGHTFUL, EXPERTS, QWEN_WORDS,
    ),
    Family(
        "Qwen 3.5", "qwen3_5", "Qwen3_5ForConditionalGeneration", "Qwen/Qwen3.5-9B", "qwen3_5_nothink", QWEN_MARKS,
        "<|im_end|>", IM_END, {**LINEAR, "vision_config": QWEN_VISION}, QWEN_WORDS, text=True,
    ),
    Family(
        "Qwen 3.5 MoE", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "Qwen/Qwen3.5-35B-A3B", "qwen3_5_nothink",
        QWEN_MARKS, "<|im_end|>", IM_END,
        {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64, "vision_config": QWEN_VISION}, QWEN_WORDS,
        text=True,
    ),
    Family(
        "Gemma 3 (270M, 1B)", "gemma3_text", "Gemma3ForCausalLM", "google/gemma-3-1b-it", "gemma3", GEMMA_MARKS,
        "<end_of_turn>", ("{}<end_of_turn>", "{}<end_of_turn>"),
        {"sliding_window": 9, "layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 16}, bos="<bos>",
    ),
    Family(
        "Gemma 3 (4B to 27B)", "gemma3", "Gemma3ForConditionalGeneration", "google/gemma-3-4b-it",
        "gemma3", GEMMA_MARKS,
        "<end_of_turn>", ("{}<end_of_turn>", "{}<end_of_turn>"),
        {
            "sliding_window": 9, "layer_types": [SLIDING, FULL], "query_pre_attn_scalar": 16, "vision_config": VISION,
            "image_token_index": VOCABULARY - 1,
        },
        bos="<bos>", text=True,
    ),
    Family(
        "Gemma 4 (E2B, E4B)", "gemma4", "Gemma4ForConditionalGeneration", "google/gemma-4-E2B-it", "gemma4_v5",
        GEMMA4_MARKS, "<turn|>", ("{}<turn|>", "{}<turn|>"),
        {
            "num_hidden_layers": 4, "sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY,
            "final_logit_softcapping": 30.0, "use_double_wide_mlp": True, "global_head_dim": 32,
            "vision_config": {**VISION, "head_dim": 16, "num_key_value_heads": 2}, "image_token_id": VOCABULARY - 1,
        },
        bos="<bos>", text=True,
    ),
    Family(
        "Gemma 4 (26B-A4B)", "gemma4", "Gemma4ForConditionalGeneration", "google/gemma-4-26B-A4B-it", "gemma4_v5",
        GEMMA4_MARKS, "<turn|>", ("{}<turn|>", "{}<turn|>"),
        {
            "sliding_window": 9, "layer_types": [SLIDING, FULL], "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 30.0, "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 64, "global_head_dim": 32, "num_global_key_value_heads": 1,
            "vision_config": {**VISION, "head_dim": 16, "num_key_value_heads": 2}, "image_token_id": VOCABULARY - 1,
        },
        bos="<bos>", text=True,
    ),
    Family(
        "Phi 4", "phi3", "Phi3ForCausalLM", "microsoft/phi-4", PHI4, ("<|endoftext|>", *CHATML, "<|im_sep|>"),
        "<|im_end|>", IM_END, {"head_dim": None, "original_max_position_embeddings": 512},
    ),
    Family(
        "Phi 4 mini", "phi3", "Phi3ForCausalLM", "microsoft/Phi-4-mini-instruct", PHI4_MINI,
        ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), "<|endoftext|>",
        ("{}<|end|>", "{}<|end|><|endoftext|>"),
        {
            "head_dim": None, "tie_word_embeddings": True, "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
                "long_factor": [1.5] * 6, "short_factor": [1.0] * 6,
            },
        },
    ),
    Family(
        "Mistral 7B", "mistral", "MistralForCausalLM", "mistralai/Mistral-7B-Instruct-v0.3", MISTRAL, MISTRAL_MARKS,
        "</s>", ("{}</s>", "{}</s>"), {"sliding_window": None}, bos="<s>",
    ),
    Family(
        "Mistral Small 3.x", "mistral3", "Mistral3ForConditionalGeneration",
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506", MISTRAL, MISTRAL_MARKS, "</s>", ("{}</s>", "{}</s>"),
        {
            "model_type": "mistral", "sliding_window": None, "image_token_index": VOCABULARY - 1,
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        },
        bos="<s>", text=True,
    ),
    Family(
        "Ministral 8B", "ministral", "MinistralForCausalLM", "mistralai/Ministral-8B-Instruct-2410", MISTRAL,
        MISTRAL_MARKS, "</s>", ("{}</s>", "{}</s>"), {"sliding_window": 9, "layer_types": [SLIDING, FULL]}, bos="<s>",
    ),
    Family(
        "Ministral 3", "mistral3", "Mistral3ForConditionalGeneration", "mistralai/Ministral-3-8B-Instruct-2512",
        MISTRAL, MISTRAL_MARKS, "</s>", ("{}</s>", "{}</s>"),
        {
            "model_type": "ministral3", "image_token_index": VOCABULARY - 1,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        },
        bos="<s>", text=True,
    ),
    Family(
        "SmolLM3", "smollm3", "SmolLM3ForCausalLM", "HuggingFaceTB/SmolLM3-3B", SMOLLM3, ("<|end_of_text|>", *CHATML),
        "<|im_end|>", IM_END, {"head_dim": None, "no_rope_layers": [1, 0], "tie_word_embeddings": True}, QWEN_WORDS,
    ),
    Family(
        "Granite 4 (dense)", "granitemoehybrid", "GraniteMoeHybridForCausalLM", "ibm-granite/granite-4.0-micro",
        GRANITE, GRANITE_MARKS, "<|end_of_text|>", ("{}<|end_of_text|>", "{}<|end_of_text|>"),
        {
            "head_dim": None, "layer_types": ["attention", "attention"], "num_local_experts": 0,
            "num_experts_per_tok": 0, "shared_intermediate_size": 128, "embedding_multiplier": 12,
            "logits_scaling": 8, "residual_multiplier": 0.22, "attention_multiplier": 0.0625,
            "position_embedding_type": "rope", "tie_word_embeddings": True,
        },
    ),
    Family(
        "Granite 4 (H)", "granitemoehybrid", "GraniteMoeHybridForCausalLM", "ibm-granite/granite-4.0-h-tiny",
        GRANITE, GRANITE_MARKS, "<|end_of_text|>", ("{}<|end_of_text|>", "{}<|end_of_text|>"),
        {
            "head_dim": None, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
            "shared_intermediate_size": 64, "embedding_multiplier": 12, "logits_scaling": 6,
            "residual_multiplier": 0.22, "attention_multiplier": 0.0625, "position_embedding_type": "nope",
            "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "OLMo 2", "olmo2", "Olmo2ForCausalLM", "allenai/OLMo-2-1124-7B-Instruct", OLMO2,
        ("<|endoftext|>", "<|pad|>"), "<|endoftext|>", ("{}<|endoftext|>", "{}<|endoftext|>"), {"head_dim": None},
        bos="<|endoftext|>",
    ),
    Family(
        "OLMo 3", "olmo3", "Olmo3ForCausalLM", "allenai/Olmo-3-7B-Instruct", OLMO3, ("<|pad|>", *OLMO_MARKS),
        "<|endoftext|>", ("{}<|im_end|>", "{}<|endoftext|>"),
        {"head_dim": None, "sliding_window": 9, "layer_types": [SLIDING, FULL]},
    ),
    Family(
        "GLM 4 (9B, 32B)", "glm4", "Glm4ForCausalLM", "zai-org/GLM-4-9B-0414", GLM4, GLM_MARKS, "<|endoftext|>",
        ("\n{}<|user|>", "\n{}<|user|>"), {"partial_rotary_factor": 0.5, "attention_bias": True},
    ),
    Family(
        "GLM 4.5 Air", "glm4_moe", "Glm4MoeForCausalLM", "zai-org/GLM-4.5-Air", GLM4, GLM_MARKS, "<|endoftext|>",
        ("\n{}<|user|>", "\n{}<|user|>"),
        {
            "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "first_k_dense_replace": 1, "partial_rotary_factor": 0.5, "attention_bias": True,
        },
        QWEN_WORDS,
    ),
    Family(
        "DeepSeek R1 distill (Qwen)", "qwen2", "Qwen2ForCausalLM", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "deepseek_r1_distill", DEEPSEEK_MARKS, "<｜end▁of▁sentence｜>",
        ("{}<｜end▁of▁sentence｜>", "{}<｜end▁of▁sentence｜>"), {"head_dim": None}, QWEN_WORDS,
        bos="<｜begin▁of▁sentence｜>", like="Qwen/Qwen2.5-7B-Instruct",
    ),
    Family(
        "DeepSeek R1 distill (Llama)", "llama", "LlamaForCausalLM", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "deepseek_r1_distill", DEEPSEEK_MARKS, "<｜end▁of▁sentence｜>",
        ("{}<｜end▁of▁sentence｜>", "{}<｜end▁of▁sentence｜>"), {"rope_parameters": LLAMA_ROPE}, QWEN_WORDS,
        bos="<｜begin▁of▁sentence｜>", like="meta-llama/Llama-3.1-8B-Instruct",
    ),
    Family(
        "LFM2", "lfm2", "Lfm2ForCausalLM", "LiquidAI/LFM2-1.2B", "lfm2_v2", LFM_MARKS, "<|im_end|>", IM_END,
        {"head_dim": None, "layer_types": ["conv", FULL], "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        bos="<|startoftext|>",
    ),
    Family(
        "gpt-oss", "gpt_oss", "GptOssForCausalLM", "openai/gpt-oss-20b", "gptoss", GPT_OSS_MARKS, "<|return|>",
        ("<|channel|>final<|message|>{}<|end|>", "<|channel|>final<|message|>{}<|return|>"),
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9, "layer_types": [SLIDING, FULL],
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1.5e5, "factor": 32.0, "original_max_position_embeddings": 64,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            },
        },
        bos="<|startoftext|>", attention="eager",
    ),
]  # fmt: skip


def make_base(family: Family, folder: Path, seed: int = 0) -> Path:
    """A tiny random model of the family's class with its tokenizer, as its publisher lays them down."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    engine = Tokenizer.from_str(_engine())
    engine.add_tokens([AddedToken(word, special=False, normalized=False) for word in family.words])
    engine.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in family.marks])
    engine.save(str(folder / "tokenizer.json"))
    pad = next((mark for mark in family.marks if "pad" in mark or "endoftext" in mark), family.eos)
    roles = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": pad}
    named = {role: token for role, token in roles.items() if token}
    described = {**named, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    ids = {f"{role}_id": engine.token_to_id(token) for role, token in named.items()}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family.model_type, **family.tiny(ids))
    model = getattr(transformers, family.architecture)(config)
    with torch.no_grad():  # norms and biases that say nothing would hide what goes wrong with them
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(_template(family), encoding="utf-8")
    return folder


def _template(family: Family) -> str:
    import trl

    if "{" in family.template:
        return family.template
    if family.template.endswith(".jinja"):
        return (ROOT / family.template).read_text(encoding="utf-8")
    file = Path(trl.__file__).parent / "chat_templates" / f"{family.template}.jinja"
    return file.read_text(encoding="utf-8")


def _engine() -> str:
    """A byte-level vocabulary learnt of a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return str(tokenizer.to_str())
