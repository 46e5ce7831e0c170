"""``cola configs``: the configurations that come with the package."""

from collections.abc import Sequence
from pathlib import Path

from cola_lightning.cli.help import command_parser, parse_options
from cola_lightning.errors import UserError, nearest

NAMES = "Copy these configs, or all of them if you type `all`. Without a name, the configs are listed."
PACKAGE = Path(__file__).parent.parent
# In a wheel the configurations are in the package, in a clone next to it.
FOLDER = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())


def configs(words: Sequence[str]) -> None:
    """Runs ``cola configs``.

    Args:
        words: its arguments.

    Raises:
        UserError: for an unknown name, and a file that already exists.
    """
    parser = command_parser("configs")
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=NAMES)
    parser.add_argument("--output", type=Path, default=Path("configs"), metavar="DIR", help="Copy the configs to this folder.")
    parser.add_argument("--overwrite", action="store_true", help="Replace files that exist already.")
    options = parse_options(parser, words)
    found = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}
    if not options.names:
        print("\n".join(found))
        print("\n`cola configs NAME` copies a configuration to configs/, where the commands in its header expect it.")
        return
    requested = list(found) if options.names == ["all"] else [name.removesuffix(".yaml") for name in options.names]
    if unknown := [name for name in requested if name not in found]:
        raise UserError(f"names: there is no config {unknown[0]!r}{nearest(unknown[0], found)} (all: {', '.join(found)})")
    # A folder of the same name has a configuration's data.
    paths = [path for name in requested for path in (found[name], *sorted(found[name].with_suffix("").rglob("*.csv")))]
    targets = {path: options.output / path.relative_to(FOLDER) for path in paths}
    existing = [] if options.overwrite else [str(target) for target in targets.values() if target.exists()]
    if existing:
        raise UserError(f"output: {existing[0]!r} exists already. Add --overwrite to replace it")
    for path, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        print(f"written: {target}")
