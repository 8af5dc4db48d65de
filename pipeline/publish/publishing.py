"""onebase publish: write, check, and only then show.

1. the stage as it was sealed (sealed.py)
2. its files, in a folder that is not the destination (adapter.py, merged.py, gguf.py)
3. the parity gate (gate.py), in two new processes
4. the card and the record (card.py, onebase.json)
5. the destination: a folder that takes its name at once, or one commit on the Hub (hub.py)
"""

from __future__ import annotations

from pathlib import Path

from pipeline.disk.atomic import Json, file_hashes, temporary_beside, write_json, write_text, written_whole
from pipeline.errors import UserError
from pipeline.models.published import PREFIX
from pipeline.models.quiet import quiet
from pipeline.models.record import RECORD, listed_files
from pipeline.models.spec import cache_folder
from pipeline.publish import hub
from pipeline.publish.sealed import Sealed, read_sealed
from pipeline.recipe.recipe import RUNS, Recipe
from pipeline.runs.environment import ended_in_order

FORMS = ("adapter", "merged", "gguf")


@ended_in_order()
def publish(
    recipe: Recipe,
    stage: str,
    to: str,
    form: str = "adapter",
    *,
    runs: Path | str = RUNS,
    private: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
) -> list[tuple[str, int]]:
    """Publish a finished stage to a folder or to the Hub (`hub:OWNER/NAME`), and return its files with their sizes.

    form: adapter, merged (onto the dequantised base) or gguf.  private: of a Hub repository that has to be created.
    dry_run: everything but the destination.  overwrite: also over what this did not write.

    Raises UserError, and leaves the destination as it was, if what was written does not answer as what was trained.
    """
    if form not in FORMS:
        raise UserError(f"--as {form}: unknown form (there is: {', '.join(FORMS)})")
    source = read_sealed(recipe, stage, Path(runs))
    if source.num_labels and form == "gguf":
        what = f"'{stage}' is {source.what}; GGUF has no place for a score head"
        raise UserError(f"{what}. Publish --as adapter or merged")
    on_hub, name = to.startswith(PREFIX), to.removeprefix(PREFIX)
    if not on_hub:
        name = Path(to).name
        _refuse_around(Path(to), source.artifact.folder)
        _refuse_foreign(Path(to), overwrite)
    elif not dry_run:
        hub.check_right(name, overwrite)
    scratch = cache_folder() / "publish" / "files"  # not /tmp, which is memory on many machines
    with temporary_beside(scratch) if on_hub or dry_run else written_whole(Path(to).resolve()) as folder:
        _fill(source, form, folder, name)
        if on_hub and not dry_run:
            hub.push(name, folder, private, overwrite)
        return [(str(f.relative_to(folder)), f.stat().st_size) for f in sorted(folder.rglob("*")) if f.is_file()]


def _fill(source: Sealed, form: str, folder: Path, name: str) -> None:
    """Write the files, have them checked, and describe them."""
    from pipeline.publish import adapter, card, gate, gguf, merged

    print(f"writing {source.artifact.name} as {form}, and comparing it with what was trained ...", flush=True)
    quiet()
    load: Json | None = None
    ggufs: list[str] = []
    if form == "adapter":
        adapter.write(source, folder)
        load = adapter.loading(source, folder)
        _write_record(source, form, folder, load, {})  # by which the gate loads it
    elif form == "merged":
        merged.write(source, folder)
    else:
        ggufs = gguf.write(source, folder)
    parity = gate.check(source, form, folder, ggufs)
    files = sorted(file.name for file in folder.iterdir())
    write_text(folder / "README.md", card.render(source, form, name, files, parity, load))
    _write_record(source, form, folder, load, parity)


def _write_record(source: Sealed, form: str, folder: Path, load: Json | None, parity: dict[str, Json]) -> None:
    """How to load it, where it comes from, what was checked, and the hashes of all other files."""
    from importlib.metadata import version

    hashes = {name: sha for name, sha in file_hashes(folder).items() if name != RECORD}
    write_json(
        folder / RECORD,
        {
            "onebase": version("onebase"),
            "form": form,
            "stage": source.artifact.name,
            "kind": source.kind,
            "fingerprint": source.manifest.fingerprint,
            "base": source.base_id,
            "base_hash": source.manifest.base_hash,
            "load": load,
            "parity": parity,
            "lineage": [entry.as_json() for entry in source.lineage],
            "files": hashes,
        },
    )


def _refuse_around(destination: Path, stage: Path) -> None:
    """What is published replaces the folder whole, so it must hold neither the run nor where one works or lives."""
    for inside, what in ((stage, "the stage itself"), (Path.cwd(), "the current folder"), (Path.home(), "your home")):
        if inside.resolve().is_relative_to(destination.resolve()):
            raise UserError(
                f"--to {destination}: it holds {what}, and publishing replaces the whole folder; name a new folder"
            )


def _refuse_foreign(folder: Path, overwrite: bool) -> None:
    """A folder may be replaced if all it holds is an earlier publication, unaltered."""
    if not folder.exists() or overwrite:
        return
    if not folder.is_dir():
        raise UserError(f"--to {folder} is a file")
    held = {name: sha for name, sha in file_hashes(folder).items() if name != RECORD}
    listed = listed_files(folder / RECORD)
    foreign = sorted(name for name, sha in held.items() if listed.get(name) != sha)
    if foreign:
        raise UserError(
            f"--to {folder} holds files that no publication wrote, or that were changed since (first: {foreign[0]}). "
            "Choose another folder, or add --overwrite to replace all that it holds"
        )
