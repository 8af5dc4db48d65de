"""A published adapter on the Hub, pulled as the finished stage it is. Plain Python: no torch.

`hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` stands where a recipe names a stage (`from:`) or a base (`model.base`).
"""

from __future__ import annotations

import functools
import math
import re
import shutil
from pathlib import Path

from pipeline.disk.artifact import WEIGHTS, Artifact
from pipeline.disk.atomic import Json, file_hashes, written_whole
from pipeline.errors import UserError
from pipeline.models.record import CONFIG, RECORD, SIZES, Adapter, Record, read
from pipeline.models.spec import cache_folder

PREFIX = "hub:"
_WANTED = "to go on from it, it must be published --as adapter"
_REFERENCE = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?")


@functools.cache
def pulled(reference: str) -> Artifact:
    """The published stage as an artifact in the cache, its files proven to be those that were published.

    Asked once per process; the revision that was found then is the one that is used. Raises UserError if there is no
    such repository, it holds no adapter that OneBase published, or a file of it has been altered since.
    """
    repository, revision = _parsed(reference)
    return taken(reference, repository, _snapshot(repository, revision))


def taken(reference: str, repository: str, snapshot: Path) -> Artifact:
    """A downloaded publication as an artifact in the cache. Nothing of it is believed that has not been looked at."""
    files = {name: _inside(snapshot, name, reference) for name in (RECORD, CONFIG, WEIGHTS)}
    if not files[RECORD].exists():
        raise UserError(f"{reference} holds nothing that `onebase publish` wrote; {_WANTED}")
    record = read(files[RECORD], RECORD, Record, reference)
    if record.form != "adapter" or record.load is None:
        raise UserError(f"{reference} holds a {record.form} publication; {_WANTED}")
    folder = cache_folder() / "published" / f"{repository.replace('/', '--')}--{snapshot.name[:16]}" / record.stage
    if (folder / "manifest.json").is_file():
        return Artifact(folder)
    with written_whole(folder) as new:
        (new / "adapter").mkdir()
        for name in (CONFIG, WEIGHTS):
            if not files[name].is_file() or files[name].stat().st_size > SIZES[name]:
                raise UserError(f"{reference}: its {name} is missing, or larger than {SIZES[name] >> 20} MiB")
            shutil.copyfile(files[name], new / "adapter" / name)
        hashes = file_hashes(new / "adapter")
        for name, sha in hashes.items():
            if record.files.get(name) != sha:
                raise UserError(f"{reference}: {name} is not the file that was published")
        adapter = read(new / "adapter" / CONFIG, CONFIG, Adapter, reference)
        if (adapter.base_model_name_or_path, adapter.revision) != (record.load.base, record.load.revision):
            raise UserError(f"{reference}: its {CONFIG} and its {RECORD} name different bases")
        _check_weights(new / "adapter" / WEIGHTS, reference)
        Artifact(new).seal(record.manifest(f"{repository}@{snapshot.name}"))
    return Artifact(folder)


def _inside(snapshot: Path, name: str, reference: str) -> Path:
    """Where a file of a snapshot really lies: in the Hub client's folder of that repository, not behind a link."""
    real = (snapshot / name).resolve()
    if not real.is_relative_to(snapshot.resolve().parents[1]):
        raise UserError(f"{reference}: its {name} is a link to somewhere else")
    return real


def _check_weights(file: Path, reference: str) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            strange = [name for name in tensors.keys() if not name.startswith("base_model.model.")]  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{reference}: its {WEIGHTS} cannot be read: {error}") from None
    if strange:
        raise UserError(
            f"{reference}: its {WEIGHTS} holds tensors that do not belong to an adapter, first {strange[0][:60]!a}"
        )


def load_words(reference: str) -> Json:
    """How the base under a published adapter is loaded: base (Hub id), revision, dtype, quantization."""
    return pulled(reference).finished().load or {}


def pinned(reference: str) -> str:
    """The same publication by its commit."""
    return f"{PREFIX}{pulled(reference).finished().hub}"


def refusal(what: str, error: Exception) -> UserError:
    """A failure of the Hub client in words that say what to do. The token is in none of them."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(getattr(error, "server_message", None) or error).strip().split("\n")[0]
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
    return UserError(f"{what} ({constants.ENDPOINT}): {type(error).__name__}{code}: {reason}\n  {advice}{xet}")


def _parsed(reference: str) -> tuple[str, str | None]:
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference}: expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    return match[1], match[2]


def _snapshot(repository: str, revision: str | None) -> Path:
    """The three files that are needed, in the Hub client's cache; without a network those that lie there already."""
    from huggingface_hub import HfApi, snapshot_download

    failed = f"{PREFIX}{repository} cannot be pulled"
    unreached: Exception | None = None
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:  # the client raises a different class for each way a network can fail
        if getattr(getattr(error, "response", None), "status_code", 500) < 500:
            raise refusal(failed, error) from None
        unreached = error
    else:
        for file in info.siblings or []:
            if (file.size or 0) > SIZES.get(file.rfilename, math.inf):
                raise UserError(f"{failed}: its {file.rfilename} is larger than {SIZES[file.rfilename] >> 20} MiB")
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(SIZES), local_files_only=unreached is not None
            )
        )
    except Exception as error:  # as above
        raise refusal(failed, unreached or error) from None
