"""A million rows: how fast they are checked and fingerprinted, and how much memory that and packing them takes.

python scripts/bench_data.py [--rows N] [--kind chat|text] [--pack BASE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.data.contracts import DEMONSTRATION, LANGUAGE_MODELING
from pipeline.data.files import hash_content
from pipeline.data.load import DataSpec, read_split

WORDS = [f"word{number}" for number in range(5000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=["chat", "text"], default="chat")
    parser.add_argument("--pack", metavar="BASE", help="also tokenize and pack them with this base's tokenizer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write(path, given.rows, given.kind)
        print(f"{given.rows} rows, {path.stat().st_size / 2**20:.0f} MiB, {os.cpu_count()} cores")
        timed("fingerprint", given.rows, lambda: hash_content(str(path)))
        contract = DEMONSTRATION if given.kind == "chat" else LANGUAGE_MODELING
        split = timed("contract check", given.rows, lambda: read_split(DataSpec(path=str(path)), contract, seed=1))
        assert len(split.train) == given.rows
        timed(
            "check and hold out 1 %",
            given.rows,
            lambda: read_split(DataSpec(path=str(path), test=0.01), contract, seed=1),
        )
        if given.pack:
            pack(split.train, given)


def pack(rows: Any, given: argparse.Namespace) -> None:
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    from pipeline.data import render
    from pipeline.training import sequences

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(given.pack)

    def encode(row: dict[str, Any]) -> render.Encoded:
        if given.kind == "chat":
            return render.demonstration(tokenizer, row)
        return render.document(tokenizer, row["text"])

    def stored() -> Any:
        tally = sequences.Tally("bench", skip=False)
        return sequences.store(rows, encode, sequences.TEXTS, tally, sequences.keep_whole)

    tokens = timed("tokenize and write", given.rows, stored)
    timed("read back", given.rows, lambda: sum(len(text.ids) for text in tokens))
    packed = timed("pack to 1024", given.rows, lambda: pack_dataset(tokens.dataset, 1024, "bfd_split"))
    print(f"  {len(packed)} packs")


def timed(what: str, rows: int, work: Callable[[], Any]) -> Any:
    before, started = resident(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"  {what:<24} {seconds:7.1f} s  {rows / seconds:9.0f} rows/s  "
        f"memory {before:.0f} -> {resident():.0f} MiB, highest so far {peak:.0f}",
        flush=True,
    )
    return result


def resident() -> float:
    """MiB that are the process's own; files mapped into memory are the kernel's to drop."""
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))) / 1024


def write(path: Path, rows: int, kind: str) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            asked = f"{number} " + " ".join(rng.choices(WORDS, k=12))
            answer = " ".join(rng.choices(WORDS, k=24))
            row: dict[str, Any] = {"text": f"{asked} {answer}"}
            if kind == "chat":
                row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
