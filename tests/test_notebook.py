"""The notebook runs from its first cell to its last; with few steps in the quick round."""

import re
from pathlib import Path
from typing import Any

import papermill
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "digits.ipynb"


@pytest.mark.parametrize("parameters", [{"steps": 4}, pytest.param({}, marks=pytest.mark.full)], ids=["few", "all"])
def test_the_notebook_draws_digits(parameters: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[2]))
    options: dict[str, Any] = {"progress_bar": False, "start_timeout": 600, "cwd": tmp_path}
    done = papermill.execute_notebook(NOTEBOOK, tmp_path / "done.ipynb", parameters, **options)
    outputs = {cell["id"]: cell.get("outputs", []) for cell in done.cells}
    assert outputs["sample"][-1]["data"]["image/png"]
    recognised = re.search(r"asked for: (\d+)%", outputs["evaluate"][-1]["text"])
    assert recognised
    assert parameters or int(recognised[1]) > 60
