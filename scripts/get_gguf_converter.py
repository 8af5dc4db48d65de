"""Fetch llama.cpp's converter from safetensors to GGUF into the cache, for `onebase publish --as gguf`.

    python scripts/get_gguf_converter.py

It is taken out of the source package of llama-cpp-python on PyPI, which carries llama.cpp whole; nothing of it is
built or installed. Where there is a checkout of llama.cpp, name it in LLAMA_CPP instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pipeline.disk.atomic import sha256_of_file, written_whole
from pipeline.models.spec import cache_folder

SOURCE = "llama-cpp-python==0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
WANTED = ("convert_hf_to_gguf.py", "LICENSE", "conversion/", "gguf-py/")


def main() -> None:
    to = cache_folder() / "llama.cpp"
    if (to / "convert_hf_to_gguf.py").is_file():
        print(f"{to} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", scratch, SOURCE]
        try:
            subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {SOURCE} could not be fetched: {error}")
        package = next(Path(scratch).glob("*.tar.gz"))
        if sha256_of_file(package) != SHA256:
            sys.exit(f"error: {package.name} is not the file that was tested (its sha256 is {sha256_of_file(package)})")
        with written_whole(to) as folder, tarfile.open(package) as archive:
            for member in archive:
                name = member.name.partition("/vendor/llama.cpp/")[2]
                if member.isfile() and name.startswith(WANTED):
                    member.name = name
                    archive.extract(member, folder, filter="data")
    print(f"{to}: from PyPI ({SOURCE})")


if __name__ == "__main__":
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    main()
