import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import refused, tiny

from flows.command.main import main
from storage.config import Config
from storage.header import Provenance
from storage.manifest import Manifest, stage_output
from storage.seal import opened, sealed


class Plain(Config):
    """A config for stages that exist only here."""


@pytest.fixture
def committed() -> Callable[..., Manifest]:
    """Commits a small output of two objects."""

    def make(root: Path, stage: str = "plain") -> Manifest:
        out = stage_output(str(root), stage, 1, Plain(), parents={}, inputs={})
        return out.commit(Manifest, [out.put("b/two", b"22"), out.put("one", b"1")])

    return make


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
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("bytes: sizes and records as committed")
    assert re.search(r": the chain ends in the archive: train [0-9a-f]{64}$", said[1])
    assert len(said) == 2

    tar = output / "train" / "00001.tar"
    whole, mtime = tar.read_bytes(), (output / "train" / "00000.tar").stat().st_mtime_ns
    tar.write_bytes(whole[:-1] + b"\1")
    assert main(["verify", str(output)]) == 0  # the size is right
    assert main(["verify", "--full", str(output)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert f"{tar}: does not hold the bytes that were committed" in said
    again = f"1 damaged, withdrawn; `ditflow shard RECIPE --root {root}` with the same --set options makes it again"
    assert said[-1].endswith(again)
    gone = f"{output}: was damaged, and `ditflow verify` has withdrawn it; run shard again"
    assert gone in refused(capsys, ["encode", "demo", "--from", str(output), *shard[2:]])
    assert f"the stages before it are not done; {output} was damaged, and" in refused(capsys, ["encode", *shard[1:]])

    assert main(shard) == 0
    assert tar.read_bytes() == whole
    assert (output / "train" / "00000.tar").stat().st_mtime_ns == mtime
    assert main(["verify", "--full", str(root)]) == 0


def test_nothing_to_verify(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no finished output found" in refused(capsys, ["verify", str(tmp_path / "nowhere")])


def test_one_damaged_output_does_not_hide_another(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, committed: Callable[..., Manifest]
) -> None:
    sound, damaged, linked = (committed(tmp_path, stage) for stage in ("a", "b", "c"))
    (tmp_path / "a" / "unreadable").mkdir()
    (tmp_path / "a" / "unreadable" / "manifest.json").write_text("{")
    Path(sound.uri, "notes.txt").write_text("")
    Path(damaged.uri, "one").write_bytes(b"2")
    Path(linked.uri, "one").unlink()
    elsewhere = tmp_path / "elsewhere"
    Path(linked.uri).rename(elsewhere)
    Path(linked.uri).symlink_to(elsewhere)
    assert main(["verify", "--full", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{sound.uri}/notes.txt: was not committed",
        f"{sound.uri}: 2 objects, 3 bytes: all bytes as committed",
        f"{tmp_path}/a/unreadable/manifest.json: does not hold the bytes that were committed; "
        "delete manifest.json there and run the stage again, which keeps what is done",
        f"{damaged.uri}/one: does not hold the bytes that were committed",
        f"{damaged.uri}: 2 objects, 3 bytes: 1 damaged, withdrawn; `ditflow b RECIPE --root {tmp_path}` with the same "
        "--set options makes it again",
        f"{linked.uri}/one: is missing",
        f"{linked.uri}: 2 objects, 3 bytes: 1 damaged, not withdrawn "
        f"({linked.uri}: a symbolic link to {elsewhere}, and nothing is removed through links)",
        f"{tmp_path}/elsewhere: is part of no finished output",
    ]
    assert err.startswith("fault: 3 of 4 outputs are damaged or cannot be checked; run the commands that made")
    assert Path(elsewhere, "manifest.json").exists()


def test_what_servers_keep_in_a_root_is_not_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, committed: Callable[..., Manifest]
) -> None:
    committed(tmp_path)
    files = ("mlflow.db", "mlflow.db-wal", "mlflow-users.db", "mlflow-users.db-journal", "mlflow-passwords.ini")
    for name in (*files, "servers.json", "prefect", "running", "workers"):
        (tmp_path / name).touch()
    assert main(["verify", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.fixture
def chain(tmp_path: Path) -> list[Manifest]:
    """Shards, and two outputs after them, in a root."""
    made: list[Manifest] = []
    for number, stage in enumerate(("shard", "train", "evaluate")):
        parents, inputs = ({"source": made[-1]}, {}) if made else ({}, {"train": "ab" * 32})
        out = stage_output(str(tmp_path / "root"), stage, 1, Plain(), parents=parents, inputs=inputs)
        made.append(out.commit(Manifest, [out.put("one", bytes([number]))], metrics={"fd": 111.8}))
    return made


def test_a_number_is_checked_down_to_the_archive(capsys: pytest.CaptureFixture[str], chain: list[Manifest]) -> None:
    shards, model, metrics = chain
    assert main(["verify", "--full", metrics.uri]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"{made.uri}: 1 objects, 1 bytes: all bytes as committed" for made in (metrics, model, shards)),
        f"{shards.uri}: the chain ends in the archive: train {'ab' * 32}",
    ]
    Path(model.uri, "one").write_bytes(b"x")
    assert main(["verify", "--full", metrics.uri]) == 1
    assert f"{model.uri}: 1 objects, 1 bytes: 1 damaged, withdrawn; " in capsys.readouterr().out
    assert main(["verify", metrics.uri]) == 1
    assert f"{model.uri}: was damaged, and `ditflow verify` has withdrawn it" in capsys.readouterr().out


def test_a_moved_root_is_checked_where_it_is(
    capsys: pytest.CaptureFixture[str], chain: list[Manifest], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    (tmp_path / "root").rename(moved)
    assert main(["verify", f"{moved}/evaluate/{chain[-1].folder_name}"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith(f"{moved}/shard/")


@pytest.mark.parametrize("everything", [False, True])
def test_a_link_that_was_made_anew_is_named(
    capsys: pytest.CaptureFixture[str], chain: list[Manifest], everything: bool
) -> None:
    shards, model, metrics = chain
    path = Path(shards.url)
    path.write_bytes(sealed(opened(path.read_bytes()).replace(b"111.8", b"211.8")))
    assert main(["verify", "--full", metrics.root if everything else metrics.uri]) == 1
    text = f"{model.uri}: was made from other bytes than its source has now, {shards.uri}; delete manifest.json there"
    assert any(line.startswith(text) for line in capsys.readouterr().out.splitlines())


def test_one_digit_of_a_number_is_noticed(capsys: pytest.CaptureFixture[str], chain: list[Manifest]) -> None:
    path = Path(chain[-1].url)
    path.write_bytes(path.read_bytes().replace(b"111.8", b"211.8"))
    for place in (chain[-1].uri, chain[-1].root):
        assert main(["verify", place]) == 1
        assert f"{path}: does not hold the bytes that were committed" in capsys.readouterr().out


def test_what_a_pipeline_made_is_made_again_by_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    provenance = Provenance(pipeline_id="my-recipe-0a1b2c3d")
    out = stage_output(str(tmp_path), "a", 1, Plain(), parents={}, inputs={}, provenance=provenance)
    out.commit(Manifest, [out.put("one", b"1")])
    Path(out.uri, "one").unlink()
    assert main(["verify", str(tmp_path)]) == 1
    assert f"`ditflow run my-recipe --root {tmp_path}` with" in capsys.readouterr().out
