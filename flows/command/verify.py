"""``ditflow verify``: check outputs against what was committed, and withdraw damaged ones."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

from storage import uri
from storage.errors import DitflowError, StorageError
from storage.manifest import is_finished, output_folder

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.verify import Fault

HELP = "check that outputs are what was committed, and withdraw damaged ones"
SHOWN = 10
"""Most uncommitted files of an output that are named."""
_MADE_BY = {"references": "evaluate", "reports": "report"}
"""The commands that make outputs of other names."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = "manifest or folder of one output, which is checked with all that it was made from; or a root with many"
    parser.add_argument("url", help=text)
    text = "read every byte and compare hashes (default: sizes and commit records alone)"
    parser.add_argument("--full", action="store_true", help=text)


def run(options: Namespace) -> None:
    """Check an output and all that it was made from, or all outputs; damage of one does not hide that of another."""
    from flows.inventory import OURS
    from storage.verify import outputs, stray

    found, folder = outputs(options.url), output_folder(options.url)
    others = [] if is_finished(folder) else stray(folder, OURS)
    sound = [_is_sound(output, full=options.full) for output in found]
    _name(folder, others, "is part of no finished output")
    if not all(sound):
        bad = f"{sound.count(False):,} of {len(sound):,} outputs are damaged or cannot be checked"
        raise StorageError(f"{bad}; run the commands that made the withdrawn ones again: they redo what is damaged")


def _is_sound(output: "Manifest | DitflowError", *, full: bool) -> bool:
    """Print the state of an output, and withdraw it if it is damaged; return whether it is as committed."""
    if isinstance(output, DitflowError):
        print(output, flush=True)
        return False
    try:
        return _check(output, uri.redact(output.uri), full=full)
    except StorageError as error:
        print(f"{uri.redact(output.uri)}: not checked to the end: {error}", flush=True)
        return False


def _check(output: "Manifest", where: str, *, full: bool) -> bool:
    from storage.verify import faults, uncommitted

    found = faults(output, full=full)
    for fault in found:
        print(f"{uri.join(where, fault.entry.path)}: {fault.damage}")
    _name(where, uncommitted(output), "was not committed")
    size = sum(entry.size for entry in output.files)
    seen = "all bytes" if full else "sizes and records"
    state = _withdrawn(output, found) if found else f"{seen} as committed"
    print(f"{where}: {len(output.files):,} objects, {size:,} bytes: {state}", flush=True)
    if not found and not output.parents and output.inputs:
        ends = ", ".join(f"{name} {digest}" for name, digest in output.inputs.items())
        print(f"{where}: the chain ends in {'the archive: ' if output.stage == 'shard' else ''}{ends}", flush=True)
    return not found and not (full and output.stage == "register" and _export_faults(output))


def _export_faults(output: "Manifest") -> bool:
    """Print what is wrong with the files of a registered model; return whether anything is."""
    from flows.registry.exported import export_faults  # imports MLflow, which takes seconds

    found = export_faults(output.uri)
    print("\n".join(found or [f"{uri.redact(output.uri)}: the registered files are those of the checkpoint"]))
    return bool(found)


def _withdrawn(output: "Manifest", found: "list[Fault]") -> str:
    """Withdraw an output if any object is known to be damaged; say what was found and done."""
    from storage.verify import withdraw

    damaged = [fault for fault in found if fault.compared]
    unknown = [f"{len(found) - len(damaged):,} cannot be checked"] if len(damaged) < len(found) else []
    if not damaged:
        return unknown[0]
    try:
        withdraw(output, damaged)
        done = f"withdrawn; {_again(output)} makes it again"
    except StorageError as error:
        done = f"not withdrawn ({error})"
    return ", ".join([*unknown, f"{len(damaged):,} damaged, {done}"])


def _again(output: "Manifest") -> str:
    """The command that makes an output, as far as the manifest knows it."""
    pipeline = output.provenance.pipeline_id
    command = "run" if pipeline else _MADE_BY.get(output.stage, output.stage)
    recipe = pipeline.rpartition("-")[0] if pipeline else "RECIPE"
    force = " --force" if output.rerun else ""
    return f"`ditflow {command} {recipe} --root {quote(uri.redact(output.root))}{force}` with the same --set options"


def _name(where: str, paths: Sequence[str], what: str) -> None:
    """Name the first files of a list, and count the others."""
    for path in paths[:SHOWN]:
        print(f"{uri.join(uri.redact(where), path)}: {what}")
    if len(paths) > SHOWN:
        print(f"{uri.redact(where)}: {len(paths) - SHOWN:,} more like the last one")
