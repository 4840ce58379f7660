"""Outputs of a few bytes, as stages make them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.config import Config
from storage.header import Provenance
from storage.manifest import Manifest, StageOutput, stage_output

CHAIN = ("shard", "encode", "train", "sample", "evaluate")


class Value(Config):
    value: int = 0


def planned(root: str, stage: str, value: int = 0, recipe: str = "", **parents: Manifest) -> StageOutput:
    provenance = Provenance(pipeline_id=recipe or None)
    return stage_output(root, stage, 1, Value(value=value), parents=parents, inputs={}, provenance=provenance)


def made(out: StageOutput, cached: Mapping[str, Manifest] | None = None, **fields: Any) -> Manifest:
    out = out.using(cached or {})
    out.begin()
    return out.commit(Manifest, [out.put("a/b", out.uri.encode()), out.put("c", b"1")], **fields)


def twenty_recipes(root: str) -> list[Manifest]:
    """Their evaluations. Recipes share shards, latents, models, samples and reference statistics with others."""
    reference, evaluations = made(planned(root, "references")), []
    for number in range(20):
        recipe, source = f"recipe{number}-{number:08x}", dict[str, Manifest]()
        for stage, alike in zip(CHAIN, (10, 5, 3, 2, 1), strict=True):
            out = planned(root, stage, number // alike, recipe, **source)
            cached = {"reference": reference} if stage == "evaluate" else None
            source = {stage: out.committed(Manifest) or made(out, cached)}
        evaluations.append(source["evaluate"])
    pages = (evaluations[:1], evaluations[1:3], evaluations)
    for shown in pages:
        made(planned(root, "reports", **{each.folder_name: each for each in shown}))
    return evaluations


def files(root: Path) -> set[str]:
    """All that lies in a local root."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}
