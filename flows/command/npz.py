"""``ditflow npz``: samples for ADM's evaluation suite."""

from argparse import ArgumentParser, Namespace

from storage import uri

HELP = "write samples to one npz file, as ADM's evaluation suite reads it"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("samples", help="manifest of samples, or its folder")
    parser.add_argument("file", help="path or URL of a new file; its name ends in .npz")


def run(options: Namespace) -> None:
    """Write the file."""
    from dit.write_npz import write_npz
    from flows.tracking.progress import StageProgress
    from flows.tracking.sink import StageTracker

    with StageProgress("npz").shown() as progress:
        write_npz(options.samples, options.file, StageTracker(None, progress.update))
    print(uri.redact(options.file))
