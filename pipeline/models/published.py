"""A published adapter on the Hub, pulled as the finished stage it is. Plain Python: no torch.

`hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` stands where a recipe names a stage (`from:`) or a base (`model.base`).
"""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

from pipeline.artifact import WEIGHTS, Artifact, Json, file_hashes, read_json, write_json, written_whole
from pipeline.errors import UserError
from pipeline.models.spec import cache_folder

RECORD = "onebase.json"
"""Beside what is published: how to load it, its lineage, and the hashes of its files."""
PREFIX = "hub:"
_REFERENCE = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_ADAPTER = ("adapter_*", "token*", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja", "*.model")


@functools.cache
def pulled(reference: str) -> Artifact:
    """The published stage as an artifact in the cache, its files proven to be those that were published.

    Asked once per process; the revision that was found then is the one that is used. Raises UserError if there is no
    such repository, it holds no adapter that OneBase published, or a file of it has been altered since.
    """
    repository, revision = _parsed(reference)
    snapshot = _snapshot(repository, revision)
    record = read_json(snapshot / RECORD)
    if record is None or record.get("form") != "adapter":
        held = "nothing that `onebase publish` wrote" if record is None else f"a {record.get('form')} publication"
        raise UserError(f"{reference} holds {held}; to go on from it, it must be published --as adapter")
    folder = cache_folder() / "published" / f"{repository.replace('/', '--')}--{snapshot.name[:16]}" / record["stage"]
    if not (folder / "manifest.json").is_file():
        found = file_hashes(snapshot)
        wanted = {name: sha for name, sha in record["files"].items() if any(Path(name).match(p) for p in _ADAPTER)}
        wrong = sorted(name for name, sha in wanted.items() if found.get(name) != sha)
        if wrong or WEIGHTS not in wanted:
            raise UserError(f"{reference}: {(wrong or [WEIGHTS])[0]} is not the file that was published")
        with written_whole(folder) as new:
            (new / "adapter").mkdir()
            for name in wanted:
                shutil.copyfile(snapshot / name, new / "adapter" / name)
            own = record["lineage"][-1]
            origin = {"hub": f"{repository}@{snapshot.name}", "lineage": record["lineage"], "load": record["load"]}
            write_json(new / "manifest.json", {**own, **origin, "files": file_hashes(new / "adapter")})
    return Artifact(folder)


def load_words(reference: str) -> Json:
    """How the base under a published adapter is loaded: base (Hub id), revision, dtype, quantization."""
    return dict((pulled(reference).manifest() or {})["load"])


def refusal(what: str, error: Exception) -> UserError:
    """A failure of the Hub client in words that say what to do. The token is in none of them."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    told = str(getattr(error, "server_message", None) or error).strip().split("\n")[0]
    advice = {
        401: "The Hub does not accept the token, or the repository is private: run `hf auth login`, or set HF_TOKEN.",
        403: "The token may not do this: use one with write access to that namespace.",
        404: "There is no such repository, or the token may not see it.",
        409: "It exists already.",
        412: "Somebody has committed to it meanwhile; look at it and run again.",
    }.get(status or 0, "Nothing was changed there; run the same command again to go on: what was uploaded is kept.")
    foreign = constants.ENDPOINT != "https://huggingface.co"
    xet = " A Hub without Xet needs HF_HUB_DISABLE_XET=1." if foreign and status not in (401, 403) else ""
    code = f" {status}" if status else ""
    return UserError(f"{what} ({constants.ENDPOINT}): {type(error).__name__}{code}: {told}\n  {advice}{xet}")


def _parsed(reference: str) -> tuple[str, str | None]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference}: expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    return match[1], match[2]


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_ADAPTER, RECORD]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise refusal(f"{PREFIX}{repository} cannot be pulled", error) from None
