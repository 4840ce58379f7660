"""``ditflow convert``: a checkpoint in another layout."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_hints, hints

HELP = "convert a checkpoint of a DiT or a latent DiffiT into another layout"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    text = ".pt or .safetensors file, diffusers folder, or folder of a trained model; path or URL"
    parser.add_argument("source", help=text)
    text = "new .pt or .safetensors file for --to reference, else a new folder"
    parser.add_argument("destination", help=text)
    parser.add_argument("--to", required=True, choices=("reference", "diffusers", "pipeline"), help="the layout")
    add_hints(parser)
    text = "folder, URL or hub id of the autoencoder for --to pipeline (default: the one that the checkpoint names)"
    parser.add_argument("--vae", metavar="SOURCE", help=text)


def run(options: Namespace) -> None:
    """Convert the checkpoint; print what was assumed and how to load the result."""
    from dit.convert import read, summary, write

    checkpoint = read(options.source, **hints(options))
    write(checkpoint, options.destination, options.to, vae=options.vae)
    print(summary(checkpoint, options.destination, options.to))
