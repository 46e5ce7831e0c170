"""The arrows between the package's parts point downwards only."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cola_lightning"

MAY_IMPORT = {
    "cli": {"training_cli", "commands"},
    "commands": {"chain", "chain_files", "inspection", "adapt", "quantization", "export", "modules"},
    "training_cli": {"chain", "chain_files", "study", "modules", "data", "callbacks", "distributed"},
    "__main__": {"cli"},
    "__init__": set(),
    "study": {"modules", "data", "callbacks"},
    "callbacks": {"schedule", "chain", "layers"},
    "modules": {
        "schedule",
        "adapt",
        "adapted_model",
        "fingerprint",
        "chain",
        "chain_files",
        "chain_folder",
        "layers",
        "distributed",
    }
    | {"quantization", "checkpoint_io"},
    "checkpoint_io": {"chain_files"},
    "export": {"chain", "adapt", "adapter"},
    "inspection": {"chain"},
    "chain_files": {"chain", "chain_folder", "adapter"},
    "chain_folder": {"chain"},
    "adapter": {"chain", "chain_folder"},
    "adapted_model": {"adapt", "chain", "distributed", "fingerprint", "layers", "quantization"},
    "fingerprint": {"adapt", "distributed"},
    "chain": {"layers", "distributed", "chain_folder"},  # the last where a chain is saved or loaded
    "adapt": {"layers", "quantization", "distributed"},
    "quantization": {"lora_layer"},
    "layers": {"lora_layer", "quantization"},
    "lora_layer": {"distributed", "stack"},
    "stack": set(),
    "distributed": set(),
    "schedule": set(),
    "data": set(),
    "errors": set(),
    "writing": set(),
    "hub": set(),
    "seeding": set(),
}

# What any part may use.
OPEN_TO_ALL = {"errors", "hub", "seeding", "writing", "__version__"}

# What the engine's own files may take from outside: torch, the standard library and, for chains on disk, safetensors.
TORCH_ONLY = {"stack", "lora_layer", "quantization", "layers", "adapt", "fingerprint", "chain", "chain_files", "chain_folder"}
TORCH_ONLY |= {"adapted_model", "adapter", "inspection", "schedule", "distributed", "errors", "writing"}
HEAVY = {"bitsandbytes", "transformers", "datasets", "peft", "matplotlib", "sklearn"}

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> list[str]:
    """Dotted names that the nodes below import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def top_level_imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    return [name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in imports(node)]


def test_every_file_of_the_package_is_seen():
    assert {part_of(path) for path in FILES} <= MAY_IMPORT.keys()
    assert len(FILES) >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    part = part_of(path)
    for name in imports(ast.parse(path.read_text())):
        head, _, tail = name.partition(".")
        if head == "cola_lightning":
            target = tail.partition(".")[0]
            assert target in MAY_IMPORT[part] | {part} | OPEN_TO_ALL, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_are_imported_when_first_used(path):
    heads = {name.partition(".")[0] for name in top_level_imports(path)}
    assert not heads & HEAVY
    if part_of(path) in TORCH_ONLY:
        assert heads <= {"torch", "typing_extensions", "safetensors", "cola_lightning"} | sys.stdlib_module_names
