"""Python imports this at its start: it notes what the process opens and lists in the file that ``OPENED`` names."""

import os
import sys

OPENED = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.scandir") and isinstance(arguments[0], str):
        os.write(OPENED, f"{event} {arguments[0]}\n".encode())


sys.addaudithook(note)
