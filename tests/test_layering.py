"""The arrows between the package's files point downwards only, and none go round in a circle."""

import ast
import graphlib
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cola_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a file imports from rows below its own, and from its own row where that is one folder.
ROWS = [
    ["constants", "errors", "__init__"],
    ["writing", "seeding", "decoding", "hub", "chat_template"],
    ["layout"],
    ["lora"],
    ["chain", "weights"],
    ["adapted_model"],
    ["export"],
    ["module"],
    ["callbacks", "data", "hf"],
    ["cli/help"],
    ["cli/training"],
    ["study"],
    ["cli"],
    ["__main__"],
]

# What these may take from outside: torch, the standard library and, for chains on disk, safetensors.
TORCH_ONLY = (
    "adapted_model",
    "chain",
    "errors",
    "layout",
    "lora",
    "seeding",
    "weights",
    "writing",
)
HEAVY = {"bitsandbytes", "transformers", "datasets", "peft", "matplotlib", "sklearn"}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def row_of(name: str) -> tuple[int, str]:
    """The row of a file, and the entry in it that stands for the file."""
    return next((k, entry) for k, row in enumerate(ROWS) for entry in row if name == entry or name.startswith(f"{entry}/"))


def imports(tree: ast.AST) -> list[str]:
    """Dotted names that the nodes below import, but for those that only a type checker needs."""
    found: list[str] = []
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {inner for node in checks for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def top_level_imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in imports(node)]


def imported_files(path: Path) -> set[str]:
    """The package's files that a file imports, each by the longest part of a dotted name that is one."""
    found = set()
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "cola_lightning":
            continue
        for n in range(len(parts), 0, -1):
            place = PACKAGE.joinpath(*parts[1:n])
            file = place.with_suffix(".py") if n > 1 and place.with_suffix(".py").is_file() else place / "__init__.py"
            if file.is_file():
                found.add(name_of(file))
                break
    return found - {name_of(path)}


def test_imports_point_downwards_and_not_in_a_circle():
    arrows = {name_of(path): imported_files(path) for path in FILES}
    assert len({row_of(name) for name in arrows}) == sum(map(len, ROWS))
    for name, imported in arrows.items():
        row, entry = row_of(name)
        wrong = [other for other in imported if row_of(other)[0] >= row and row_of(other)[1] != entry]
        assert not wrong, f"{name} imports {wrong}"
    graphlib.TopologicalSorter(arrows).prepare()


def test_heavy_libraries_are_imported_when_first_used():
    for path in FILES:
        heads = {name.partition(".")[0] for name in top_level_imports(path)}
        assert not heads & HEAVY, path
        if row_of(name_of(path))[1] in TORCH_ONLY:
            assert heads <= {"torch", "numpy", "typing_extensions", "safetensors", "cola_lightning"} | sys.stdlib_module_names
