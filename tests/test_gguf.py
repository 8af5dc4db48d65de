"""GGUF: Modelfiles say what the training template says; files by llama.cpp's converter pass the gate, others are named.

The tests that write GGUF need the converter (`python scripts/get_gguf_converter.py`) and the demo model's tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from conftest import ROOT
from peft.utils.integrations import dequantize_module_weight
from publish_run import finished_run
from safetensors.torch import load_file, save_file

from pipeline.disk.artifact import WEIGHTS
from pipeline.models.base import PLAIN_TEMPLATE
from pipeline.models.spec import cache_folder
from pipeline.publish import card, gate, gguf, merged
from pipeline.publish.sealed import Sealed, read_sealed

CHATML = (ROOT / "recipes" / "templates" / "chatml.jinja").read_text(encoding="utf-8")
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
FORGETS = CHATML.replace("message['content']", "(message['content'] if loop.last or loop.first else '')")
ASK, REPLY, RULES = ({"role": role, "content": f"{role} said: {{{{x}}}}"} for role in ("user", "assistant", "system"))
CHATS = [[ASK], [ASK, REPLY, ASK], [RULES, ASK], [RULES, ASK, REPLY, ASK]]


def rendered_by_ollama(modelfile: str, chat: list[dict[str, str]]) -> str:
    """The Go template, in the few words of it that are used, read as Jinja: neither trims around plain braces."""
    text = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)
    assert text
    go = text[1]
    for found, jinja in (
        (r'\{\{ if ne \(index \.Messages 0\)\.Role "(\w+)" \}\}', r"{% if messages[0].role != '\1' %}"),
        (r'\{\{ if eq \.Role "(\w+)" \}\}', r"{% if m.role == '\1' %}"),
        (r'\{\{ else if eq \.Role "(\w+)" \}\}', r"{% elif m.role == '\1' %}"),
    ):
        go = re.sub(found, jinja, go)
    go = go.replace("{{ range .Messages }}", "{% for m in messages %}").replace("{{ .Content }}", "{{ m.content }}")
    # What is still open is closed in the order it was opened.
    opened: list[str] = []

    def closing(mark: re.Match[str]) -> str:
        if mark[0] == "{{ end }}":
            return "{% end" + opened.pop() + " %}"
        if mark[1] in ("if", "for"):
            opened.append(mark[1])
        return mark[0]

    go = re.sub(r"\{% (\w+) .*?%\}|\{\{ end \}\}", closing, go)
    return jinja2.Environment(keep_trailing_newline=True).from_string(go).render(messages=chat)


@pytest.mark.parametrize("template", [CHATML, OWN_SYSTEM, PLAIN_TEMPLATE, NO_SYSTEM])
def test_a_modelfile_renders_what_the_template_renders(tiny_base: Path, template: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base, chat_template=template)
    written = gguf.modelfile(tokenizer, "x-q8_0.gguf")
    assert written and written.startswith("FROM ./x-q8_0.gguf\n") and 'PARAMETER stop "<|im_end|>"' in written
    for chat in CHATS if template != NO_SYSTEM else CHATS[:2]:
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert rendered_by_ollama(written, chat) == wanted


def test_a_template_that_is_no_sequence_of_turns_gets_no_modelfile(tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    assert gguf.modelfile(AutoTokenizer.from_pretrained(tiny_base, chat_template=FORGETS), "x.gguf") is None


CONVERTER = cache_folder() / "llama.cpp"  # the user's own: the tests have a cache of theirs
DEMO = ROOT / "models" / "SmolLM2-135M-Instruct"
written = pytest.mark.skipif(
    not (CONVERTER / "convert_hf_to_gguf.py").is_file() or not DEMO.is_dir() or find_spec("sentencepiece") is None,
    reason="needs llama.cpp's converter (scripts/get_gguf_converter.py), the gguf extra and the demo model's tokenizer",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sealed]:
    """A stage on a narrow base with the demo model's tokenizer, which the converter knows."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("narrow")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    runs = tmp_path_factory.mktemp("runs")
    recipe = finished_run(folder, runs, "pretrain")
    # So few steps move logits by less than the gate's tolerance; ten times the adapter shows.
    trained = recipe.artifact("pretrain", runs)
    tensors = load_file(trained.adapter / WEIGHTS)
    louder = {name: 10 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(louder, trained.adapter / WEIGHTS, metadata={"format": "pt"})
    trained.seal(trained.finished())
    yield read_sealed(recipe, "pretrain", runs)


def untied(write: Any, sealed: Sealed, folder: Path, **words: Any) -> None:
    """A merge whose head was made anew instead of being the table of the token embeddings."""
    write(sealed, folder, **words)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["lm_head.weight"] = 0.02 * torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


@written
def test_f16_is_the_trained_model_and_faults_are_named(
    source: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(CONVERTER))
    answers: dict[str, Any] = {}
    ask = gate._run

    def once(who: str, job: dict[str, Any], out: Path) -> Any:
        key = f"{who} {job['model']['quantize']}"
        if who == "readback" or key not in answers:
            answers[key] = ask(who, job, out)
        return answers[key]

    monkeypatch.setattr(gate, "_run", once)  # the trained model's answers do not depend on what was written
    (tmp_path / "sound").mkdir()
    names = gguf.write(source, tmp_path / "sound")
    assert {name.rpartition("-")[2] for name in names} >= {"f16.gguf", "q8_0.gguf"}
    parity = gate.check(source, "gguf", tmp_path / "sound", names)
    assert 0 < parity[names[0]]["kl"] < 1e-4 and parity[names[0]]["kl"] < parity[names[1]]["kl"]

    # What the card says to type, as it is printed.
    text = card.render(source, "gguf", str(tmp_path / "sound"), names, {}, None)
    typed: dict[str, Any] = {}
    exec(re.findall("```python\n(.*?)```", text, re.DOTALL)[0], typed)
    trained = answers["trained nf4"]
    with torch.no_grad():
        logits_TV = typed["model"](torch.tensor([trained["ids"][0]])).logits[0].double().numpy()
    kept_KV = trained["numbers"]["0"].astype(float)
    assert gate._kl(kept_KV, logits_TV[-len(kept_KV) :]) < 1e-3

    write = merged.write
    original = replace(source, model=source.model.model_copy(update={"quantize": "none"}))
    monkeypatch.setattr(merged, "write", lambda sealed, *args, **words: write(original, *args, **words))
    (tmp_path / "original").mkdir()
    with pytest.raises(gate.Broken, match=r"(?s)KL\(trained \|\| written\).*onto the base's original weights"):
        gate.check(source, "gguf", tmp_path / "original", gguf.write(source, tmp_path / "original"))

    (tmp_path / "headless").mkdir()
    sound = (tmp_path / "sound" / names[0]).read_bytes()
    (tmp_path / "headless" / names[0]).write_bytes(sound.replace(b"token_embd.weight", b"token_gone.weight"))
    with pytest.raises(gate.Broken, match=r"tied LM head as well, is missing"):
        gate.check(source, "gguf", tmp_path / "headless", names[:1])

    monkeypatch.setattr(merged, "write", lambda sealed, folder, **words: untied(write, sealed, folder, **words))
    (tmp_path / "untied").mkdir()
    with pytest.raises(gate.Broken, match=r"(?s)the tied LM head was lost.*KL\(trained"):
        gate.check(source, "gguf", tmp_path / "untied", gguf.write(source, tmp_path / "untied")[:1])

    monkeypatch.setattr(merged, "write", write)
    monkeypatch.setattr(merged, "_sum", lambda layer: dequantize_module_weight(layer.get_base_layer()))
    monkeypatch.setattr(gguf, "portable", lambda template: template.replace("assistant\\n", "assistant: "))
    (tmp_path / "dropped").mkdir()
    with pytest.raises(gate.Broken, match=r"(?s)chat template or the tokenizer is.*the adapter was dropped"):
        gate.check(source, "gguf", tmp_path / "dropped", gguf.write(source, tmp_path / "dropped"))
