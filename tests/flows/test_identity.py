"""The digests that earlier versions gave to the presets' stages: their outputs keep their names."""

import json
from pathlib import Path

import pytest

from flows.recipe import load_recipe
from storage.seal import json_digest

IDENTITIES = json.loads((Path(__file__).parent / "identities.json").read_text())
"""Digest of each stage's config by preset, recorded when train and sample had version 3. Entries change only with the
stage's VERSION."""


@pytest.mark.parametrize("preset", IDENTITIES)
def test_a_config_of_an_earlier_version_keeps_its_identity(preset: str) -> None:
    recipe = load_recipe(preset)
    found = {name: json_digest(recipe.config_of(name).identity()) for name in recipe.stages}
    assert found == IDENTITIES[preset]
