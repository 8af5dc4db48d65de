"""The Hub as a destination: everything is checked before it is uploaded, and appears there in one commit.

The token is the client's own business (HF_TOKEN, or `hf auth login`); the endpoint is HF_ENDPOINT.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.disk.atomic import read_json, sha256_of_file
from pipeline.errors import UserError
from pipeline.models.published import PREFIX, refusal
from pipeline.models.record import RECORD, listed_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOT_OURS = {".gitattributes"}
"""What the Hub itself puts into a repository."""


def check_right(repository: str, overwrite: bool) -> None:
    """See to it that a push can work before hours go into writing. Raises UserError naming what stands in its way."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--to {PREFIX}{repository}: {error}") from None
    if repository.count("/") != 1:
        raise UserError(f"--to {PREFIX}{repository}: expected {PREFIX}OWNER/NAME")
    if get_token() is None:
        raise UserError("publishing to the Hub needs a token: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        who = api.whoami()
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise refusal("the Hub does not say whose token this is", error) from None
    owner, mine = repository.split("/")[0], {who["name"], *(org["name"] for org in who.get("orgs", []))}
    if owner not in mine:
        raise UserError(f"--to {PREFIX}{repository}: the token is {who['name']}'s and may not write to '{owner}'")
    _held(api, repository, overwrite)


def push(repository: str, folder: Path, private: bool, overwrite: bool) -> str:
    """Upload a folder as one commit and return that commit. Files of an earlier publication that are no longer part of
    it go in the same commit. Large files that arrived before a failure are not sent again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    record = read_json(folder / RECORD) or {}
    failed = f"{PREFIX}{repository} was not published"
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        head, held = _held(api, repository, overwrite)
        if not held - NOT_OURS:
            # Not deleted: what was uploaded to it need not be sent again, and a commit may still be under way.
            failed += ", and its repository exists, without published files"
        names = {str(file.relative_to(folder)) for file in files}
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(str(file.relative_to(folder)), file) for file in files),
                *(CommitOperationDelete(name) for name in sorted(held - names - NOT_OURS)),
            ],
            commit_message=f"{record.get('stage')} as {record.get('form')}, published by OneBase",
            parent_commit=head,
        )
    except UserError:
        raise
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise refusal(failed, error) from None
    return str(commit.oid)


def _held(api: HfApi, repository: str, overwrite: bool) -> tuple[str | None, set[str]]:
    """The commit a repository is at and the files it holds, which have to be an earlier publication's, unaltered."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository, files_metadata=True)
    except RepositoryNotFoundError:
        return None, set()
    except Exception as error:  # the client raises a different class for each way a network can fail
        raise refusal(f"{PREFIX}{repository} cannot be looked at", error) from None
    held = {file.rfilename: file.lfs.sha256 if file.lfs else None for file in info.siblings or []}
    foreign = [] if overwrite else _foreign(api, repository, str(info.sha), held)
    if foreign:
        raise UserError(
            f"--to {PREFIX}{repository}: it holds files that no publication wrote, or that were changed since "
            f"(first: {foreign[0]}). Choose another name, or add --overwrite to replace all that it holds"
        )
    return info.sha, set(held)


def _foreign(api: HfApi, repository: str, commit: str, held: dict[str, str | None]) -> list[str]:
    names = sorted(held.keys() - NOT_OURS)
    if RECORD not in names:
        return names

    def fetch(name: str) -> Path:
        try:
            return Path(api.hf_hub_download(repository, name, revision=commit))
        except Exception as error:  # the client raises a different class for each way a network can fail
            raise refusal(f"{PREFIX}{repository}: {name} cannot be looked at", error) from None

    written = listed_files(fetch(RECORD))
    # The Hub tells the sha256 of large files only; the small ones are looked at.
    return [
        name
        for name in names
        if name != RECORD and (name not in written or written[name] != (held[name] or sha256_of_file(fetch(name))))
    ]
