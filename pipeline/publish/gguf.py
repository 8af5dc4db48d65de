"""GGUF files for llama.cpp and Ollama, made by llama.cpp's own converter, and an Ollama Modelfile.

The converter is no package; `python scripts/get_gguf_converter.py` puts it into the cache, and LLAMA_CPP names a
checkout of llama.cpp to use instead. q4_k_m is written where `llama-quantize` is on the PATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifact import write_text
from pipeline.errors import UserError
from pipeline.models.spec import cache_folder
from pipeline.publish import merged
from pipeline.publish.sealed import Sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def write(sealed: Sealed, folder: Path) -> list[str]:
    """Write f16, q8_0 (and q4_k_m) files with a Modelfile, and return the files' names, the most exact first.

    Raises UserError if there is no converter, or it does not know the architecture.
    """
    from transformers import AutoTokenizer

    converter = _converter()
    tokenizer = AutoTokenizer.from_pretrained(sealed.artifact.adapter)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=folder.parent) as scratch:
        # float16 holds a sum of bfloat16 weights and an adapter more exactly than bfloat16 does.
        merged.write(sealed, Path(scratch), dtype="float16")
        if tokenizer.chat_template:
            write_text(Path(scratch) / "chat_template.jinja", portable(tokenizer.chat_template))
        names = [f"{sealed.title}-{kind}.gguf" for kind in ("f16", "q8_0")]
        for kind, name in zip(("f16", "q8_0"), names, strict=True):
            _run(
                [sys.executable, str(converter), scratch, "--outtype", kind, "--outfile", str(folder / name)],
                {"PYTHONPATH": str(converter.parent / "gguf-py"), "HF_HUB_OFFLINE": "1"},
            )
    if quantize := shutil.which("llama-quantize"):
        names.append(f"{sealed.title}-q4_k_m.gguf")
        _run([quantize, str(folder / names[0]), str(folder / names[-1]), "Q4_K_M"], {})
    if tokenizer.chat_template:
        write_text(folder / "Modelfile", modelfile(tokenizer, names[1]))
    return names


def portable(template: str) -> str:
    """The template without the marks by which transformers finds what the assistant said; no other engine knows them.

    A comment in their place trims the same white space, so the text that is rendered stays the same.
    """
    return _GENERATION.sub(lambda mark: f"{{#{mark[1]} {mark[2]}#}}", template)


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf: str) -> str:
    """An Ollama Modelfile whose Go template renders what the training template renders, with its stop tokens.

    Raises UserError for a template that renders a role differently depending on the other turns.
    """
    from pipeline.data.render import stop_ids

    system, user, assistant = (_turn(tokenizer, role) for role in ("system", "user", "assistant"))
    asked = tokenizer.apply_chat_template([_said("user", "q")], tokenize=False, add_generation_prompt=True)
    opening = asked.removeprefix(tokenizer.apply_chat_template([_said("user", "q")], tokenize=False))
    messages = [_said("user", "q"), _said("assistant", "a"), _said("user", "r")]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = [user[0] + "q" + user[1], assistant[0] + "a" + assistant[1], user[0] + "r" + user[1], opening]
    if whole != "".join(parts):
        raise UserError(
            "the chat template is more than a sequence of turns, which an Ollama Modelfile cannot say. The GGUF holds "
            "the template itself: use llama-server --jinja, or set model.chat_template to a plain one and train with it"
        )
    turns = "".join(
        f'{{{{- {"if" if index == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for index, (role, (before, after)) in enumerate((("system", system), ("user", user), ("assistant", assistant)))
    )
    go = f"{{{{- range .Messages }}}}{turns}{{{{- end }}}}{{{{- end }}}}{opening}"
    stops = [tokenizer.convert_ids_to_tokens(token) for token in stop_ids(tokenizer)]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join(lines) + "\n"


def _turn(tokenizer: PreTrainedTokenizerBase, role: str) -> tuple[str, str]:
    """What the template puts before and after what a role says."""
    first = [] if role in ("system", "user") else [_said("user", "q")]
    begun = tokenizer.apply_chat_template(first, tokenize=False) if first else ""
    text = tokenizer.apply_chat_template([*first, _said(role, "<<content>>")], tokenize=False).removeprefix(begun)
    before, _, after = text.partition("<<content>>")
    return before, after


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _converter() -> Path:
    folder = Path(os.environ.get("LLAMA_CPP") or cache_folder() / "llama.cpp")
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise UserError(
            f"--as gguf needs llama.cpp's converter, and {folder} does not hold it: "
            "run `python scripts/get_gguf_converter.py`, or set LLAMA_CPP to a checkout of llama.cpp"
        )
    return folder / "convert_hf_to_gguf.py"


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise UserError(f"{Path(command[1]).name} ended with status {done.returncode}:\n  {tail}")
