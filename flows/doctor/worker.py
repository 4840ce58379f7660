"""The process that runs the checks: ``python -m flows.doctor.worker '{"asked": ..., "checks": [...]}'``.

It tells each result as a line of JSON behind `MARK`. After a check that failed by an unexpected error it ends, since
an error of CUDA makes all that follows in its process fail too; `flows.doctor.examine` starts another.
"""

import json
import sys
import time
import traceback
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from flows.doctor.table import Asked, Check
from flows.launch.rank_log import MARK
from storage.errors import DitflowError, one_line
from storage.finding import failed

REMEDY = "`ditflow doctor --json` has all that was printed"


def main(text: str) -> int:
    """Run the checks."""
    given = json.loads(text)
    asked = TypeAdapter(Asked).validate_python(given["asked"])
    for values in given["checks"]:
        check = Check(**values)
        begin, expected = time.monotonic(), True
        try:
            finding = check.run(asked)
        except DitflowError as error:
            finding = failed(str(error), "")
        except Exception as error:
            traceback.print_exc()
            finding, expected = failed(one_line(error), REMEDY), False
        _tell({"finding": asdict(finding), "seconds": time.monotonic() - begin, "ends": not expected})
        if not expected:
            return 1
    return 0


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
