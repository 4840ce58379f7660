"""What several processes of a machine need is made by one of them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pipelines import arguments, ditflow

from flows.contract import STAGES
from flows.recipe import load_recipe
from storage import uri
from storage.rows.cache import entry_path, locked
from storage.tracker import NullTracker


@pytest.mark.full
@pytest.mark.parametrize("finishes", [True, False])
def test_a_stage_waits_for_the_process_that_makes_its_output(
    tmp_path: Path, digits: Path, migrated: Callable[[Path], None], finishes: bool
) -> None:
    root = tmp_path / "root"
    migrated(root)
    given = arguments("shard", root, digits)
    recipe = load_recipe("demo", given[given.index("--set") + 1 :: 2], str(root))
    output = STAGES["shard"].output(str(root), recipe.shard, recipe.archive)
    with locked(entry_path(None, "making", uri.absolute(output.uri))):
        waiting = subprocess.Popen(ditflow(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        line = f"shard: waiting for another process, which makes {output.uri}\n"
        assert line in iter(waiting.stderr.readline, "")
        if finishes:
            STAGES["shard"].run(recipe.shard, recipe.archive, out=output, tracker=NullTracker())
    said, _ = waiting.communicate()
    assert waiting.returncode == 0
    assert f'"state": "{"skipped" if finishes else "ran"}"' in said
