"""The recipes at hand: found by name, listed, copied; and the recipe that a run's folder keeps."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.recipe.recipe import Recipe, read
from pipeline.terminal.console import make_console, print_rows


def read_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """A recipe by its file, or by a name that `onebase ls` shows."""
    return read(_find(name), *overrides)


def read_run(run: str, overrides: Sequence[str], runs: Path) -> tuple[Recipe, Path]:
    """The recipe of a run named by its recipe or by its folder, and the folder of runs it lies in."""
    folder = Path(run)
    if not os.path.isdir(folder):
        return read_recipe(run, overrides), runs
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is not the folder of a run (no recipe.yaml)")
    chain = read_recipe(str(folder / "recipe.yaml"), overrides)
    if chain.name != folder.resolve().name:
        raise UserError(f"{folder} was renamed: its recipe calls the run '{chain.name}'")
    return chain, folder.resolve().parent


def show_recipes() -> None:
    from rich.table import Table
    from rich.text import Text

    found = _recipes()
    if not found:
        raise _none()

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, path in found.items():
        table.add_row(Text(name), Text(_about(path)))
    print_rows(table, make_console())


def copy_recipe(name: str, to: Path) -> None:
    source = Path(_find(name))
    if not os.path.isfile(source):
        found = _recipes()
        meant = next((f"; did you mean '{one}'?" for one in found if one.rpartition("/")[2] == name), "")
        raise UserError(f"no recipe '{name}'{meant} (there is: {', '.join(found)})") if found else _none()
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise UserError(f"{target} is there already; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A run's folder is named by the recipe, so a copy under the old name would overwrite the old run.
    text = source.read_text(encoding="utf-8")
    target.write_text(re.sub(r"(?m)^name: .*$", f"name: {target.stem}", text, count=1), encoding="utf-8")
    print(f"{source} -> {target} (name: {target.stem})")


def _recipe_folders() -> list[Path]:
    # In a clone the recipes lie beside the package; an installed wheel puts them under share/.
    return [Path("recipes"), Path(sys.prefix) / "share" / "onebase" / "recipes"]


def _recipes() -> dict[str, Path]:
    for folder in _recipe_folders():
        if folder.is_dir():
            files = [file for file in sorted(folder.rglob("*.yaml")) if "accelerate" not in file.parts]
            return {str(file.relative_to(folder).with_suffix("")): file for file in files}
    return {}


def _none() -> UserError:
    return UserError("no recipes here: they lie in the folder recipes/ of the clone. Type the command there")


def comes_along(name: str) -> bool:
    """Whether a recipe is one of OneBase's own."""
    own = [path.resolve() for path in _recipes().values()]
    return Path(_find(name)).resolve() in own


def _find(name: str) -> str:
    return name if os.path.exists(name) else str(_recipes().get(name.removesuffix(".yaml"), name))


def _about(path: Path) -> str:
    first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.removeprefix("#").strip()
