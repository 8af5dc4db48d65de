"""Ask llama.cpp itself what a published GGUF answers, beside what transformers reads from the same file.

    pip install llama-cpp-python        # on a CPU older than the one that builds: CMAKE_ARGS=-DGGML_NATIVE=OFF
    python scripts/check_llama_cpp.py out/dpo-gguf/quickstart-dpo-f16.gguf "What colour is Farrick's lighthouse?"

Prints both greedy answers and exits with status 1 if their token ids differ. llama-cpp-python may live in another
environment: name its interpreter in LLAMA_PYTHON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

NEW_TOKENS = 32
ASK = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, seed=0, verbose=False)
ids, stops, new = json.loads(sys.argv[2])
said = []
for token in model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
    if token in stops or len(said) == new:
        break
    said.append(token)
print(json.dumps(said))
"""


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    file, question = Path(sys.argv[1]), sys.argv[2]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stops = [tokenizer.eos_token_id]
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=stops, pad_token_id=stops[0]
        )[0, len(ids) :].tolist()
    ours = whole[:-1] if whole[-1] in stops else whole
    command = [os.environ.get("LLAMA_PYTHON", sys.executable), "-c", ASK, str(file)]
    done = subprocess.run([*command, json.dumps([ids, stops, NEW_TOKENS])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    theirs = json.loads(done.stdout.splitlines()[-1])
    print(f"transformers: {tokenizer.decode(ours)!r}\nllama.cpp:    {tokenizer.decode(theirs)!r}")
    sys.exit(ours != theirs)


if __name__ == "__main__":
    main()
