"""Imports point down the layers, so that a reader of a file never has to know what stands above it."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "pipeline"
LAYERS = [
    ["errors", "language", "disk"] + ["data.contracts", "data.formats", "data.dialogues", "data.trees", "data.shelf"],
    ["models", "data"],
    ["plan"],
    ["measure"],
    ["training"],
    ["ppo"],
    ["stages"],
    ["recipe"],
    ["runs"],
    ["evaluate"],
    ["label"],
    ["terminal", "report", "publish"],
    ["bring"],
    ["cli"],
]


def layer(module: str) -> int:
    found = [
        level
        for level, names in enumerate(LAYERS)
        if any(module == name or module.startswith(f"{name}.") for name in names)
    ]
    assert found, f"pipeline.{module} belongs to no layer: say in this test where it stands"
    return found[0]


def imports(path: Path, for_types: bool = False) -> set[str]:
    """Modules of this package that a file imports, also inside functions; with `for_types` those for type checkers as
    well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
            module = (node.module or "").removeprefix("pipeline").lstrip(".")
            for alias in node.names:
                below = f"{module}.{alias.name}".lstrip(".")
                file = PACKAGE / (below.replace(".", "/") + ".py")
                found.add(below if file.exists() or (PACKAGE / below.replace(".", "/")).is_dir() else module)
    return found - {""}


def test_imports_point_down() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        module = str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        if module in ("__init__", "__main__", "data", "models", "evaluate"):
            continue
        wrong += [f"{module} -> {other}" for other in imports(path) if layer(other) > layer(module)]
    assert not wrong, f"imports that point up: {wrong}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {
        str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): imports(path, True)
        for path in PACKAGE.rglob("*.py")
    }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_no_folder_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*/*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        others = {module.partition(".")[0] for module in imports(path)}
        graph.setdefault(folder, set()).update(others - {folder})
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_light_modules_do_not_import_torch() -> None:
    import subprocess
    import sys

    light = "pipeline.cli, pipeline.recipe.recipe, pipeline.runs.worker, pipeline.evaluate.evaluation"
    light = f"{light}, pipeline.terminal.plan"
    light = f"import sys, {light}, pipeline.terminal.results"
    light += "; sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", light], cwd=PACKAGE.parent).returncode == 0
