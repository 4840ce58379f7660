"""A small row store of all kinds of arrays."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from storage import uri
from storage.manifest import Manifest, StageOutput
from storage.rows.store import ArraySpec, RowLayout, RowWriter
from storage.seal import sealed

ROWS = 21
LAYOUT = RowLayout(
    rows=ROWS,
    block_rows=8,
    arrays=(
        ArraySpec("mean", "float16", (2, 3, 2, 2), chunk_rows=4, split_axis0=True),
        ArraySpec("image", "uint8", (5, 4, 3), chunk_rows=2),
        ArraySpec("label", "int32", (), chunk_rows=8),
    ),
)


def contents() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "mean": generator.standard_normal((ROWS, 2, 3, 2, 2)).astype(np.float16),
        "image": generator.integers(0, 256, (ROWS, 5, 4, 3), np.uint8),
        "label": generator.integers(0, 10, ROWS, np.int32),
    }


def fill(out: StageOutput, arrays: Mapping[str, np.ndarray]) -> Manifest:
    writer = RowWriter(out, LAYOUT, {"made_by": "a test"})
    for block in writer.missing():
        start, stop = writer.bounds(block)
        writer.write(block, {name: values[start:stop] for name, values in arrays.items()})
    return out.commit(Manifest, writer.finish())


def resized(store: Manifest, path: str, data: bytes) -> Manifest:
    """The store with other bytes in an object and a manifest that agrees with them."""
    uri.write(f"{store.uri}/{path}", data)
    files = tuple(
        entry.model_copy(update={"size": len(data), "sha256": uri.sha256(data)}) if entry.path == path else entry
        for entry in store.files
    )
    Path(store.url).write_bytes(sealed(store.model_copy(update={"files": files}).model_dump_json().encode()))
    return Manifest.read(store.uri)
