"""The arrows between the package's files point downwards only, and none go round in a circle."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

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


def test_every_file_of_the_package_has_a_row():
    assert len({row_of(name_of(path)) for path in FILES}) == sum(map(len, ROWS))
    assert len(FILES) >= 50


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_downwards(path):
    row, entry = row_of(name_of(path))
    for name in imported_files(path):
        below, other = row_of(name)
        assert below < row or other == entry, f"{name_of(path)} imports {name}"


def test_no_imports_go_round_in_a_circle():
    graphlib.TopologicalSorter({name_of(path): imported_files(path) for path in FILES}).prepare()


def test_a_circle_would_be_found():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_are_imported_when_first_used(path):
    heads = {name.partition(".")[0] for name in top_level_imports(path)}
    assert not heads & HEAVY
    if row_of(name_of(path))[1] in TORCH_ONLY:
        assert heads <= {"torch", "numpy", "typing_extensions", "safetensors", "cola_lightning"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_text_is_utf_8_in_any_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    texts = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text")]
    assert [ast.unparse(call) for call in texts if "encoding" not in {keyword.arg for keyword in call.keywords}] == []
