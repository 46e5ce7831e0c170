"""The arrows between the package's files are those of CONTRIBUTING.md, and a command imports what it needs."""

import ast
import graphlib
import re
import sys
import tomllib
from pathlib import Path

from tests.helpers import forked

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "cola_lightning"
PATHS = {path: path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
FILES = {f"cola_lightning.{name}".replace("/", ".").removesuffix(".__init__"): name for name in PATHS.values()}
BLOCK = (ROOT / "CONTRIBUTING.md").read_text().split("\n## How the package is built\n")[1].split("```")[1]
ROWS = [["__init__"]]  # from the bottom up
ROWS += [re.split("  +", line)[0].split(", ") for line in reversed(BLOCK.splitlines()[1:])]
TORCH_ONLY = {"adapted_model", "chain", "contexts", "errors", "layout", "lora", "merge", "seeding", "trained_values", "writing"}
BY_NAME = {"lora/conv1d", "lora/linear4bit"}  # layers of other packages, imported once a model has one
ITS_NEEDS = {"torch", "numpy", "typing_extensions", "safetensors", "cola_lightning"} | sys.stdlib_module_names


def imports(path, is_top_level=False):
    """Dotted names that a file imports, inside of functions and for types too."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if is_top_level else list(ast.walk(tree))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]


def row_of(name):
    """The row of a file, and the entry in it that stands for the file."""
    return next((k, entry) for k, row in enumerate(ROWS) for entry in row if f"{name}/".startswith(f"{entry}/"))


def test_imports_point_downwards_and_not_in_a_circle_and_the_engine_needs_torch_alone():
    arrows = {}
    for path, name in PATHS.items():
        found = {FILES.get(one, FILES.get(one.rpartition(".")[0])) for one in imports(path)} - {None, name}
        row, entry = row_of(name)
        assert not [one for one in found if row_of(one)[0] >= row and row_of(one)[1] != entry], name
        arrows[name] = found
        assert not found & BY_NAME, name
        if entry in TORCH_ONLY and name not in BY_NAME:
            assert {one.partition(".")[0] for one in imports(path, is_top_level=True)} <= ITS_NEEDS, name
    graphlib.TopologicalSorter(arrows).prepare()
    assert len({row_of(name) for name in arrows}) == sum(map(len, ROWS))


def test_what_the_package_imports_at_once_is_installed_with_it():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[^\w-]", one)[0].replace("pyyaml", "yaml") for one in needed}
    names |= sys.stdlib_module_names | {"cola_lightning"}
    for path in PACKAGE.rglob("*.py"):
        if PATHS[path] not in BY_NAME:
            assert {one.partition(".")[0] for one in imports(path, is_top_level=True)} <= names, path


# What each command leaves alone of the libraries that nothing before it has imported; a fit, of those that Lightning does not.
LEFT_ALONE = {
    "fit --help": ["transformers", "datasets", "peft", "matplotlib", "sklearn", "scipy"],
    "inspect --help": ["lightning", "transformers", "datasets", "peft", "matplotlib", "sklearn", "scipy"],
    "--help": ["torch", "lightning", "transformers"],
}


def test_a_command_imports_what_it_needs():
    program = f"""
import sys
for words, left_alone in {LEFT_ALONE}.items():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cola_lightning", *left_alone)]:
        del sys.modules[name]
    from cola_lightning.cli import main
    status = main(words.split())
    print("imported:", status, *set(left_alone) & set(sys.modules))
"""
    done = forked.run("-c", program)
    assert [line for line in done.stdout.splitlines() if "imported:" in line] == ["imported: 0"] * len(LEFT_ALONE), done.stderr
