"""onebase serve: a real OpenAI client asks stages by name and gets what PEFT itself answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from publish_run import finished_run, with_decoding_words
from safetensors.torch import load_file, save_file

from pipeline.disk.artifact import WEIGHTS

openai = pytest.importorskip("openai", reason="needs pip install 'onebase[serve]'")
pytest.importorskip("fastapi", reason="needs pip install 'onebase[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install 'onebase[serve]'")

STAGES = ("pretrain", "sft")
ASKED = [{"role": "user", "content": "What is on the island?"}]


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    recipe = finished_run(with_decoding_words(tiny_base, runs / "base"), runs, *STAGES)
    # After so few steps all stages say the same; with thirty times the adapter, this one does not.
    sealed = recipe.artifact("pretrain", runs)
    tensors = load_file(sealed.adapter / WEIGHTS)
    louder = {name: 30 * tensor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(louder, sealed.adapter / WEIGHTS, metadata={"format": "pt"})
    sealed.seal(sealed.finished())
    return runs


@pytest.fixture
def url(runs: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipeline", "serve", str(runs / "tiny"), *STAGES, "--port", str(port)]
    log = runs / "serve.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)


def by_peft(base: Path, adapter: Path, new_tokens: int) -> str:
    """What transformers and PEFT answer from the sealed files, greedily."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=four_bit)
    for module in frozen.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model, tokenizer = PeftModel.from_pretrained(frozen, adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        written = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=end)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_stages_answer_by_name_as_the_sealed_adapters_do(url: str, runs: Path, tiny_base: Path) -> None:
    client = openai.OpenAI(base_url=url, api_key="none")
    assert sorted(model.id for model in client.models.list()) == sorted(STAGES)
    said = {}
    for stage in STAGES:
        answer = client.chat.completions.create(model=stage, messages=ASKED, max_tokens=12, temperature=0)
        said[stage] = answer.choices[0].message.content
        assert said[stage] == by_peft(tiny_base, runs / "tiny" / stage / "adapter", 12)
    assert said["pretrain"] != said["sft"]
    for unknown in ("dpo", "../tiny", "sft/../sft"):
        with pytest.raises(openai.NotFoundError) as refused:
            client.chat.completions.create(model=unknown, messages=ASKED, max_tokens=12)
        assert refused.value.response.json()["detail"].endswith("served are pretrain, sft")
