"""``ditflow verify``: check outputs against what was committed, and withdraw damaged ones."""

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from storage import uri
from storage.errors import StorageError

if TYPE_CHECKING:
    from storage.manifest import Manifest

HELP = "check that outputs are what was committed, and withdraw damaged ones"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("url", help="manifest or folder of one output, or a root with many")
    text = "read every byte and compare hashes (default: sizes and commit records alone)"
    parser.add_argument("--full", action="store_true", help=text)


def run(options: Namespace) -> None:
    """Check all outputs at the URL."""
    from storage.verify import outputs

    damaged = [manifest for manifest in outputs(options.url) if _damaged(manifest, full=options.full)]
    if damaged:
        raise StorageError("outputs are damaged; run the commands that made them again: they redo what is damaged")


def _damaged(manifest: "Manifest", *, full: bool) -> bool:
    """Print the state of an output, and withdraw it if it is damaged."""
    from storage.verify import faults, withdraw

    damaged, where = faults(manifest, full=full), uri.redact(manifest.uri)
    for fault in damaged:
        print(f"{uri.join(where, fault.entry.path)}: {fault.damage}")
    if damaged:
        withdraw(manifest, damaged)
    seen = "all bytes" if full else "sizes and records"
    state = f"{len(damaged):,} damaged, withdrawn" if damaged else f"{seen} as committed"
    size = sum(entry.size for entry in manifest.files)
    print(f"{where}: {len(manifest.files):,} objects, {size:,} bytes: {state}", flush=True)
    return bool(damaged)
