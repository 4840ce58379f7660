"""Flows that refuse wrong input in one line, as the command does, and not with a traceback.

A flow whose work goes on in a job for which nobody waits has completed, too, in a state of its own name.
"""

import logging
from collections.abc import Callable
from functools import wraps
from inspect import cleandoc
from typing import Any, ParamSpec, TypeVar

from prefect import Flow
from prefect.exceptions import ParameterTypeError
from prefect.states import Completed, Failed
from pydantic import ValidationError

from storage.config import problem
from storage.errors import InputError, SubmittedError

SUBMITTED = "Submitted"
"""Name of the state of a flow whose work goes on elsewhere."""


def _in_one_line(record: logging.LogRecord) -> bool:
    """Let the process of a flow run log a refusal without a traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, InputError):
        record.msg, record.args, record.exc_info = str(error), (), None
    return True


logging.getLogger("prefect.flow_runs").addFilter(_in_one_line)
P = ParamSpec("P")
R = TypeVar("R")


class RefusingFlow(Flow[P, R]):
    """A flow whose state after an `InputError` or a `SubmittedError` is its line.

    Its form explains each argument, and its page does not.
    """

    def __init__(self, fn: Callable[P, R], **options: Any) -> None:
        about = cleandoc(fn.__doc__ or "").partition("\n\nArgs:")[0]
        super().__init__(_refusing(fn), description=about, **options)

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters as their types.

        Raises:
            InputError: one of them is wrong; the line says which.
        """
        try:
            return super().validate_parameters(parameters)
        except ParameterTypeError as error:
            if isinstance(error.__context__, ValidationError):
                raise InputError(str(problem(error.__context__, parameters))) from None
            raise


def _refusing(work: Callable[P, R]) -> Callable[P, R]:
    @wraps(work)
    def refusing(*args: P.args, **given: P.kwargs) -> R:
        try:
            return work(*args, **given)
        except InputError as error:
            return Failed(message=str(error), data=error)  # type: ignore[return-value]  # Prefect raises the data
        except SubmittedError as job:
            return Completed(name=SUBMITTED, message=str(job))  # type: ignore[return-value]

    return refusing
