"""Ask llama.cpp itself what a published GGUF answers, beside what transformers reads from the same file.

    pip install llama-cpp-python        # to run on another CPU than the one that builds: CMAKE_ARGS=-DGGML_NATIVE=OFF
    python scripts/check_llama_cpp.py out/dpo-gguf/quickstart-dpo-f16.gguf "What colour is Farrick's lighthouse?" ...

For each question the token ids of the rendered prompt and the greedy answer are compared. Prints both, and exits
with status 1 if anything differs. llama-cpp-python may live in another environment: LLAMA_PYTHON names its interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
ASK = """
import json, sys
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
model = Llama(sys.argv[1], n_ctx=1024, seed=0, verbose=False)
questions, stops, new = json.loads(sys.argv[2])
template = model.metadata["tokenizer.chat_template"]
formatter = Jinja2ChatFormatter(template, eos_token="", bos_token="", add_generation_prompt=True)
for question in questions:
    text = formatter(messages=[{"role": "user", "content": question}]).prompt
    ids = model.tokenize(text.encode(), add_bos=False, special=True)
    said = []
    model.reset()
    for token in model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
        if token in stops or len(said) == new:
            break
        said.append(token)
    print(json.dumps({"ids": ids, "said": said}))
"""


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    file, questions = Path(sys.argv[1]), sys.argv[2:]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    stops = [tokenizer.eos_token_id]
    theirs = llama_cpp(file, questions, stops)
    alike = True
    for question, their in zip(questions, theirs, strict=True):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([ids]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )[0, len(ids) :].tolist()
        said = whole[:-1] if whole[-1] in stops else whole
        alike &= their == {"ids": ids, "said": said}
        print(f"{question}\n  transformers: {tokenizer.decode(said)!r}")
        print(f"  llama.cpp:    {tokenizer.decode(their['said'])!r}")
        if their["ids"] != ids:
            print(f"  the prompt becomes other tokens: {their['ids']}, in transformers {ids}")
    sys.exit(not alike)


def llama_cpp(file: Path, questions: list[str], stops: list[int]) -> list[dict[str, Any]]:
    command = [os.environ.get("LLAMA_PYTHON", sys.executable), "-c", ASK, str(file)]
    done = subprocess.run([*command, json.dumps([questions, stops, NEW_TOKENS])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"ids"')]


if __name__ == "__main__":
    main()
