"""Objects that are written in pieces."""

from pathlib import Path

import pytest

from storage import uri
from storage.pieces import pieces


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_an_object_is_whole_or_absent(place: str, tmp_path: Path, memory: str) -> None:
    url = uri.join(str(tmp_path) if place == "disk" else memory, "a")
    with pytest.raises(KeyboardInterrupt), pieces(url, 6) as object_:
        object_.write(b"abc")
        raise KeyboardInterrupt
    assert not uri.exists(url)
    with pieces(url, 6) as object_:
        object_.write(b"abc")
        object_.write(bytearray(b"def"))
        assert not uri.exists(url)
    assert uri.read(url) == b"abcdef"
    assert (object_.size, object_.sha256) == (6, uri.sha256(b"abcdef"))
    assert uri.names(uri.parent(url)) == ["a"]
