"""Data sets of the `datasets` library: on the Hub, or saved by it in a folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.contracts import Row
from pipeline.errors import UserError


def saved_by_datasets(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_saved(folder: Path, split: str) -> Iterator[Row]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(f"{folder} cannot be read: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{folder} has no split '{split}' (there is: {', '.join(loaded)})")
        loaded = loaded[split]
    yield from loaded


def read_hub(path: str, split: str) -> Iterator[Row]:
    import datasets

    # The commit that was fingerprinted, whatever is pushed meanwhile.
    revision = find_commit(path)
    try:
        loaded = datasets.load_dataset(path, split=split, revision=revision)
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise _unreachable(path, f"it could not be loaded from the Hub ({type(error).__name__}: {error})") from error
    yield from loaded


@functools.cache
def find_commit(path: str) -> str:
    """The commit a data set is at, asked once: the rows that are read are those the fingerprint is of."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path, timeout=10).sha)
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise _unreachable(path, f"the Hub did not answer for it ({type(error).__name__})") from error


def _unreachable(path: str, problem: str) -> UserError:
    instead = "Point data.path at a local file to go on without the Hub."
    return UserError(f"{path}: no such local file, and {problem}. {instead}")
