"""``ditflow pin`` and ``ditflow unpin``: say which outputs are to stay, whatever else becomes of them."""

from argparse import ArgumentParser, Namespace

from flows.command.options import add_output, add_root
from storage.errors import InputError


class PinCommand:
    """The command that pins, or the one that removes a pin."""

    def __init__(self, *, removes: bool) -> None:
        self.removes = removes
        self.HELP = "remove the pin of an output" if removes else "keep an output, and what it was made from, from gc"

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments of the command."""
        add_output(parser, "output")
        if not self.removes:
            parser.add_argument("--reason", default="", help="why; kept with the pin")
        add_root(parser)

    def run(self, options: Namespace) -> None:
        """Pin the output, or remove its pin."""
        from flows.claims import wait
        from flows.inventory import Inventory, pinned
        from storage import uri
        from storage.root import pin, unpin

        output = Inventory.of(options.root).find(options.output)
        if not self.removes:
            pin(options.root, pinned(output, options.reason))
            wait(options.root)  # for a gc that has not seen the pin
            if not uri.names(output.url):
                unpin(options.root, output.key)
                raise InputError(f"{output.key}: has just been deleted by `ditflow gc`")
            print(f"{output.key} is pinned")
        elif unpin(options.root, output.key):
            print(f"{output.key} is not pinned any more")
        else:
            raise InputError(f"{output.key}: is not pinned")


PIN, UNPIN = PinCommand(removes=False), PinCommand(removes=True)
