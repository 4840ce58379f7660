"""The command ``ditflow`` and its exit codes.

0 when done, 1 after a fault, 2 if the user's input is wrong, 3 if the work goes on elsewhere, 75 if the ranks were
preempted too often, 130 after Ctrl-C, 143 after SIGTERM. After 3 the same command looks how far the work is; after the
last three it resumes.
"""

import io
import os
import signal
import sys
import traceback
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from flows import servers, temporary
from flows.command import (
    average,
    convert,
    demo,
    deploy,
    diff,
    doctor,
    evaluate,
    gc,
    init,
    ls,
    milestones,
    models,
    npz,
    plan,
    promote,
    report,
    run,
    sample,
    scaling,
    schema,
    show,
    tree,
    up,
    verify,
    worker,
)
from flows.command.options import check_names, check_root
from flows.command.pin import PIN, UNPIN
from flows.command.stage import StageCommand
from flows.contract import STAGES
from storage import uri
from storage.archives.once import listed_once
from storage.code_version import code_version
from storage.errors import DitflowError, InputError, PreemptedError, SubmittedError


class Command(Protocol):
    """The interface of a command's module.

    It imports nothing heavy before ``run``: help comes at once, and Prefect, which reads its settings when it is
    imported, is imported after they are set.
    """

    HELP: str

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments of the command."""

    def run(self, options: Namespace) -> None:
        """Run the command."""


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "init": init,
    "run": run,
    **{name: StageCommand(stage) for name, stage in STAGES.items()},
    "average": average,
    "sample": sample,
    "evaluate": evaluate,
    "milestones": milestones,
    "up": up,
    "deploy": deploy,
    "worker": worker,
    "npz": npz,
    "report": report,
    "scaling": scaling,
    "promote": promote,
    "plan": plan,
    "doctor": doctor,
    "verify": verify,
    "models": models,
    "convert": convert,
    "schema": schema,
    "ls": ls,
    "show": show,
    "tree": tree,
    "diff": diff,
    "pin": PIN,
    "unpin": UNPIN,
    "gc": gc,
}
EXPERIMENTAL = "Experimental: launch.kind kubernetes, shard.runner.kind ray, which no real cluster has run yet."
READING = frozenset(["ls", "show", "tree", "diff"])
"""Commands that write nothing to the root."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. SIGTERM ends it with 143, after its child processes have ended."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks how a word may go on
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    servers.bypass_proxy()
    try:
        if "root" in options and getattr(options, "checkpoint", None) is None:
            check_root(options.root, reading=options.command in READING)
        if "root" in options and options.command != "up":  # which starts one
            servers.use_shared_mlflow(options.root)
        if "root" in options:
            check_names(options)
        if "force" in options and sys.stderr.isatty():
            sys.stderr.write("starting, which takes some seconds\n")
        with temporary.of_command(), listed_once():
            COMMANDS[options.command].run(options)
    except InputError as error:
        _say("error", error)
        return 2
    except PreemptedError as error:
        _say("preempted", error)
        return PreemptedError.EXIT_CODE
    except SubmittedError as error:
        _say("submitted", error)
        return SubmittedError.EXIT_CODE
    except DitflowError as error:
        _say("fault", error)
        return 1
    except BrokenPipeError:  # the reader of the pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _parser() -> ArgumentParser:
    """Its result has the name of the command as ``command``."""
    text = "From images to a registered Diffusion Transformer."
    top = ArgumentParser(prog="ditflow", description=text, epilog=EXPERIMENTAL)
    top.add_argument("--version", action=_Version, nargs=0, help="print the version of the code, and exit")
    commands = top.add_subparsers(required=True, metavar="command", dest="command")
    for name, command in COMMANDS.items():
        text = f"{command.HELP[0].upper()}{command.HELP[1:]}."
        of_it = commands.add_parser(name, help=command.HELP, description=text)
        command.add_arguments(of_it)
        of_it.epilog = EXPERIMENTAL if "--set" in of_it.format_usage() else None
    return top


class _Version(Action):
    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        print(f"ditflow {code_version()}")
        parser.exit()


def _say(what: str, error: DitflowError) -> None:
    sys.stderr.write(f"{what}: {uri.printable(str(error))}\n")


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
