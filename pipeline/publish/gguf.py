"""GGUF files for llama.cpp and Ollama, made by llama.cpp's own converter, and an Ollama Modelfile.

The converter is no package; `python scripts/get_gguf_converter.py` puts it into the cache, and LLAMA_CPP names a
checkout of llama.cpp to use instead. q4_k_m is written where `llama-quantize` is on the PATH, or llama-cpp-python is
installed: here, or beside the interpreter that LLAMA_PYTHON names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.disk.atomic import temporary_beside, write_text
from pipeline.errors import UserError
from pipeline.models.spec import cache_folder
from pipeline.publish import merged
from pipeline.publish.sealed import Sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT = "<<content>>"
QUANTIZE = """
import ctypes, sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings)))
"""
_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


def write(sealed: Sealed, folder: Path) -> list[str]:
    """Write f16, q8_0 (and q4_k_m) files, with a Modelfile where Ollama can say the template, and return the names of
    the GGUF files, the most exact first.

    Raises UserError if there is no converter, or it does not know the architecture.
    """
    from transformers import AutoTokenizer

    converter = _converter()
    tokenizer = AutoTokenizer.from_pretrained(sealed.artifact.adapter)
    with temporary_beside(folder.parent / "merged") as scratch:
        # float16 holds a sum of bfloat16 weights and an adapter more exactly than bfloat16 does.
        merged.write(sealed, scratch, dtype="float16")
        if tokenizer.chat_template:
            write_text(scratch / "chat_template.jinja", portable(tokenizer.chat_template))
        names = [f"{sealed.title}-{kind}.gguf" for kind in ("f16", "q8_0")]
        for kind, name in zip(("f16", "q8_0"), names, strict=True):
            _run(
                [sys.executable, str(converter), str(scratch), "--outtype", kind, "--outfile", str(folder / name)],
                {"PYTHONPATH": str(converter.parent / "gguf-py"), "HF_HUB_OFFLINE": "1"},
            )
    if quantize := _quantizer():
        names.append(f"{sealed.title}-q4_k_m.gguf")
        _run([*quantize, str(folder / names[0]), str(folder / names[-1]), "Q4_K_M"], {})
    if tokenizer.chat_template and (text := modelfile(tokenizer, names[1])):
        write_text(folder / "Modelfile", text)
    return names


def portable(template: str) -> str:
    """The template without the marks by which transformers finds what the assistant said; no other engine knows them.

    A comment in their place trims the same white space, so the text that is rendered stays the same.
    """
    return _GENERATION.sub(lambda mark: f"{{#{mark[1]} {mark[2]}#}}", template)


def modelfile(tokenizer: PreTrainedTokenizerBase, gguf: str) -> str | None:
    """An Ollama Modelfile whose Go template renders what the training template renders, with its stop tokens.

    None for a template that a Go template of turns cannot say: the GGUF holds the Jinja template itself.
    """
    from jinja2 import TemplateError

    from pipeline.data.tokens import stop_ids

    def text(*turns: tuple[str, str], ask: bool = False) -> str:
        told = [{"role": role, "content": content} for role, content in turns]
        return str(tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=ask))

    def around(before: str, *turns: tuple[str, str]) -> tuple[str, str]:
        """What the template puts before and after the content of the last turn."""
        opened, _, closed = text(*turns).removeprefix(before).partition(CONTENT)
        return opened, closed

    ask, reply = ("user", "q"), ("assistant", "a")
    try:
        turns = {
            "user": around(text(ask, reply), ask, reply, ("user", CONTENT)),
            "assistant": around(text(ask), ask, ("assistant", CONTENT)),
        }
        unasked = text(ask).removesuffix("q".join(turns["user"]))  # a system prompt of the template's own, or BOS
        opening = text(ask, ask=True).removeprefix(text(ask))
        with contextlib.suppress(TemplateError):  # of a template that knows no system prompt
            turns["system"] = around("", ("system", CONTENT))
    except TemplateError:
        return None

    def said(*told: tuple[str, str]) -> str:
        begun = "" if told[0][0] == "system" else unasked
        return begun + "".join(content.join(turns[role]) for role, content in told) + opening

    rules = ("system", "Be brief.")
    chats = [(ask,), (ask, reply, ask), *([(rules, ask), (rules, ask, reply, ask)] if "system" in turns else [])]
    pieces = [unasked, opening, *(piece for turn in turns.values() for piece in turn)]
    if any(said(*chat) != text(*chat, ask=True) for chat in chats) or any(
        mark in piece for piece in pieces for mark in ("{{", '"""')
    ):
        return None
    bos = tokenizer.bos_token
    if bos and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]:  # Ollama puts it there as well
        unasked = unasked.removeprefix(bos)
        turns |= {"system": (turns["system"][0].removeprefix(bos), turns["system"][1])} if "system" in turns else {}
    # No "{{-": it would swallow the line break that closes a turn.
    start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{unasked}{{{{ end }}}}' if unasked else ""
    each = " else ".join(
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{' for role, (before, after) in turns.items()
    )
    go = f"{start}{{{{ range .Messages }}}}{{{{ {each} end }}}}{{{{ end }}}}{opening}"
    stops = [tokenizer.convert_ids_to_tokens(token) for token in stop_ids(tokenizer)]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{go}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join(lines) + "\n"


def _converter() -> Path:
    folder = Path(os.environ.get("LLAMA_CPP") or cache_folder() / "llama.cpp")
    if not (folder / "convert_hf_to_gguf.py").is_file():
        raise UserError(
            f"--as gguf needs llama.cpp's converter, and {folder} does not hold it: "
            "run `python scripts/get_gguf_converter.py`, or set LLAMA_CPP to a checkout of llama.cpp"
        )
    return folder / "convert_hf_to_gguf.py"


def _quantizer() -> list[str] | None:
    if program := shutil.which("llama-quantize"):
        return [program]
    python = os.environ.get("LLAMA_PYTHON") or (sys.executable if find_spec("llama_cpp") else None)
    return [python, "-c", QUANTIZE] if python else None


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        name = "llama_cpp" if QUANTIZE in command else Path(command[1]).name
        raise UserError(f"{name} ended with status {done.returncode}:\n  {tail}")
