from pathlib import Path

import pytest
from command_line import refused, tiny

from flows.command.main import main


def test_damage_is_named_withdrawn_and_mended_by_the_same_command(
    capsys: pytest.CaptureFixture[str],
    images: Path,
    root: Path,
    prefect_api: str,
) -> None:
    shard = ["shard", "demo", *tiny(images, root, "shard.images_per_shard=8")]
    assert main(shard) == 0
    (output,) = (root / "shard").iterdir()
    capsys.readouterr()
    assert main(["verify", str(root)]) == 0
    assert capsys.readouterr().out.endswith("bytes: sizes and records as committed\n")

    tar = output / "train" / "00001.tar"
    whole, mtime = tar.read_bytes(), (output / "train" / "00000.tar").stat().st_mtime_ns
    tar.write_bytes(whole[:-1] + b"\1")
    assert main(["verify", str(output)]) == 0  # the size is right
    assert main(["verify", "--full", str(output)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"{tar}: does not hold the bytes that were committed" in said
    assert said[-1].endswith("1 damaged, withdrawn")
    assert "no finished output" in refused(capsys, ["encode", "demo", "--from", str(output), *shard[2:]])

    assert main(shard) == 0
    assert tar.read_bytes() == whole
    assert (output / "train" / "00000.tar").stat().st_mtime_ns == mtime
    assert main(["verify", "--full", str(root)]) == 0


def test_nothing_to_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no finished output found" in refused(capsys, ["verify", str(tmp_path / "nowhere")])
