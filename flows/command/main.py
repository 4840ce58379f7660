"""The command ``ditflow`` and its exit codes.

0 when done, 1 after a fault, 2 if the user's input is wrong, 75 if the ranks were preempted too often, 130 after
Ctrl-C, 143 after SIGTERM. After the last three the same command resumes.
"""

import io
import os
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from flows import servers, temporary
from flows.command import (
    average,
    convert,
    demo,
    evaluate,
    milestones,
    models,
    npz,
    plan,
    promote,
    report,
    run,
    sample,
    scaling,
    up,
    verify,
)
from flows.command.options import check_root
from flows.command.stage import StageCommand
from flows.contract import STAGES
from storage import uri
from storage.archives.once import listed_once
from storage.errors import DitflowError, InputError, PreemptedError


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
    "run": run,
    **{name: StageCommand(stage) for name, stage in STAGES.items()},
    "average": average,
    "sample": sample,
    "evaluate": evaluate,
    "milestones": milestones,
    "up": up,
    "npz": npz,
    "report": report,
    "scaling": scaling,
    "promote": promote,
    "plan": plan,
    "verify": verify,
    "models": models,
    "convert": convert,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. SIGTERM ends it with 143, after its child processes have ended."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a letter
    options = _parser().parse_args(arguments)
    servers.bypass_proxy()
    try:
        if "root" in options and getattr(options, "checkpoint", None) is None:
            check_root(options.root)
        with temporary.of_command(), listed_once():
            COMMANDS[options.command].run(options)
    except InputError as error:
        _say("error", error)
        return 2
    except PreemptedError as error:
        _say("preempted", error)
        return PreemptedError.EXIT_CODE
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
    top = ArgumentParser(prog="ditflow", description="From images to a registered Diffusion Transformer.")
    commands = top.add_subparsers(required=True, metavar="command", dest="command")
    for name, command in COMMANDS.items():
        text = f"{command.HELP[0].upper()}{command.HELP[1:]}."
        command.add_arguments(commands.add_parser(name, help=command.HELP, description=text))
    return top


def _say(what: str, error: DitflowError) -> None:
    sys.stderr.write(f"{what}: {uri.printable(str(error))}\n")


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
