"""What the command says, and how it exits, when the user's input is wrong or the disk is full."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import refused, tiny
from diffusers import AutoencoderKL
from PIL import Image

from flows.command import models
from flows.command.main import main
from flows.demo import VAE
from storage.code_version import code_version


def test_the_console_shows_the_line_and_no_traceback(images: Path, root: Path, prefect_api: str) -> None:
    (images / "class1" / "words.png").write_bytes(b"these are words, not pixels")
    command = [sys.executable, "-m", "flows.command.main", "shard", "demo", *tiny(images, root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (said,) = [
        line for line in done.stderr.splitlines() if " | WARNING | EventsWorker " not in line
    ]  # on a slow machine
    assert said.startswith("error: 1 of the first ")
    told = subprocess.run([*command, "-v"], capture_output=True, text=True, check=False)
    assert " | INFO " in told.stderr
    assert said in told.stderr.splitlines()


def test_unknown_config_key(capsys: pytest.CaptureFixture[str], images: Path, root: Path) -> None:
    line = refused(capsys, ["run", "demo", *tiny(images, root, "train.stepz=3")])
    assert line == "error: --set train.stepz=3: train.stepz: no such key; did you mean train.steps?"


def test_missing_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    line = refused(capsys, ["run", "demo", *tiny(tmp_path / "nowhere", root)])
    assert str(tmp_path / "nowhere") in line


def test_class_folder_without_images(capsys: pytest.CaptureFixture[str], images: Path, root: Path) -> None:
    (images / "empty").mkdir()
    line = refused(capsys, ["run", "demo", *tiny(images, root)])
    assert "empty" in line


@pytest.fixture
def sharded(capsys: pytest.CaptureFixture[str], images: Path, root: Path, prefect_api: str) -> str:
    """The manifest of the images' shards."""
    assert main(["shard", "demo", *tiny(images, root), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    return str(stages[0]["manifest"])


def test_weights_that_are_not_there(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, tmp_path: Path, sharded: str
) -> None:
    arguments = tiny(images, root, f"encode.vae={{source: {tmp_path / 'no-vae'}}}")
    line = refused(capsys, ["encode", "demo", *arguments, "--from", sharded])
    assert str(tmp_path / "no-vae") in line


def test_altered_weights(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, tmp_path: Path, sharded: str
) -> None:
    copy = Path(shutil.copytree(VAE, tmp_path / "vae"))
    expected = json.loads((VAE / "metrics.json").read_text())["sha256"]
    weights = copy / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    arguments = tiny(images, root, f"encode.vae={{source: {copy}, sha256: {expected}}}")
    line = refused(capsys, ["encode", "demo", *arguments, "--from", sharded])
    assert str(weights) in line
    assert expected in line


def test_vae_whose_channels_do_not_fit_the_model(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, tmp_path: Path, prefect_api: str
) -> None:
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
                  up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, latent_channels=8,
                  ).save_pretrained(tmp_path / "vae8")  # fmt: skip
    for stage in ("shard", "encode", "train"):
        assert main([stage, "demo", *tiny(images, root)]) == 0
    capsys.readouterr()
    line = refused(capsys, ["sample", "demo", *tiny(images, root, f"sample.vae={{source: {tmp_path / 'vae8'}}}")])
    assert "8 latent channels" in line
    assert "the model 4" in line


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("words.png", b"these are words, not pixels", "not an image"),
        ("cut.png", None, "truncated"),
        ("dot.png", "1x1", "1x1"),
        ("corrupt.png", "flip", ""),
    ],
)
def test_unreadable_image(
    capsys: pytest.CaptureFixture[str],
    images: Path,
    root: Path,
    prefect_api: str,
    name: str,
    data: bytes | str | None,
    reason: str,
) -> None:
    whole = (images / "class0" / "000.png").read_bytes()
    path = images / "class1" / name
    if data == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif data == "flip":
        path.write_bytes(whole[:100] + bytes(byte ^ 0xFF for byte in whole[100:120]) + whole[120:])
    else:
        path.write_bytes(whole[: len(whole) // 2] if data is None else data)  # type: ignore[arg-type]
    line = refused(capsys, ["shard", "demo", *tiny(images, root)])
    assert f"class1/{name}" in line
    assert reason in line
    assert main(["shard", "demo", *tiny(images, root, "shard.max_unreadable=0.05"), "--json"]) == 0
    manifest = Path(json.loads(capsys.readouterr().out)["stages"][0]["manifest"])
    unreadable = json.loads(manifest.read_text())["unreadable"]
    assert [entry["name"] for entry in unreadable] == [f"class1/{name}"]
    assert reason in unreadable[0]["reason"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    images: Path,
    root: Path,
    small_disk: Path,
    prefect_api: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    line = refused(capsys, ["shard", "demo", *tiny(images, small_disk)], code=1)
    assert "the disk is full" in line
    assert str(small_disk) in line
    assert not list(small_disk.rglob("manifest.json"))


def test_a_source_of_another_stage(capsys: pytest.CaptureFixture[str], images: Path, root: Path, sharded: str) -> None:
    line = refused(capsys, ["train", "demo", *tiny(images, root), "--from", sharded])
    assert "'shard'" in line
    assert "'encode' is needed" in line


def test_a_source_that_is_no_run(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, prefect_api: str
) -> None:
    line = refused(capsys, ["encode", "demo", *tiny(images, root), "--from", "0" * 32])
    assert "0" * 32 in line


def test_a_stage_before_its_source(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, prefect_api: str
) -> None:
    line = refused(capsys, ["train", "demo", *tiny(images, root)])
    assert "train: the stages before it are not done" in line


def test_unusable_root(capsys: pytest.CaptureFixture[str], images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "File exists" in refused(capsys, ["run", "demo", *tiny(images, tmp_path / "file")])
    assert "not a usable URL" in refused(capsys, ["demo", "--root", "nowhere://x"])
    line = refused(capsys, ["demo", "--root", "ftp://alice:hunter2@127.0.0.1/x"])
    assert "the URL contains credentials" in line
    assert "hunter2" not in line


def test_an_archive_url_carries_no_credentials(capsys: pytest.CaptureFixture[str], images: Path, root: Path) -> None:
    line = refused(capsys, ["run", "demo", *tiny(images, root, "archive.train=ftp://alice:hunter2@127.0.0.1/x")])
    assert "archive.train: the URL contains credentials" in line


def test_recipe_that_is_no_text(capsys: pytest.CaptureFixture[str], tmp_path: Path, root: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "bad.yaml: cannot be read as text" in refused(
        capsys, ["run", str(tmp_path / "bad.yaml"), "--root", str(root)]
    )


def test_class_folder_without_readable_images(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, prefect_api: str
) -> None:
    (images / "words").mkdir()
    (images / "words" / "notes.txt").write_text("no image")
    line = refused(capsys, ["shard", "demo", *tiny(images, root, "shard.max_unreadable=0.5")])
    assert "class 'words'" in line


@pytest.mark.parametrize(
    ("root", "why"),
    [
        ("memory://runs?version=1", "the URL has a query"),
        ("a\nb", "line break"),
        ("", "empty"),
        ("s3:/bucket", "a URL has ://"),
    ],
)
def test_a_root_that_would_be_misread(
    root: str,
    why: str,
    capsys: pytest.CaptureFixture[str],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.iterdir())
    assert re.search(why, refused(capsys, ["plan", "demo", *tiny(images, Path("x")), "--root", root]))
    assert list(tmp_path.iterdir()) == before


def test_a_terminal_may_lack_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(models, "table", lambda _: ["图 é"])
    assert main(["models"]) == 0
    shown.flush()
    assert shown.buffer.getvalue() == b"\\u56fe \\xe9\n"


def test_usage_error_exits_with_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2


HELP = """
import io, sys
from contextlib import redirect_stdout, suppress
from flows.command.main import COMMANDS, main
for arguments in ([], *([name] for name in COMMANDS)):
    with suppress(SystemExit), redirect_stdout(io.StringIO()) as shown:
        main([*arguments, "--help"])
    assert shown.getvalue().startswith(" ".join(["usage: ditflow", *arguments])), arguments
print(*{"torch", "prefect", "mlflow", "rich", "jinja2"} & sys.modules.keys())
"""


def test_help_comes_before_anything_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


REFUSALS = {
    "run nosuch": "recipe 'nosuch': neither a YAML file nor one of the presets",
    "plan demoo": "did you mean demo?",
    "run demo --set trian.steps=3": "trian: no such key; did you mean train?",
    "train demo": "the stages before it are not done",
    "sample demo --from nowhere": "nowhere: neither a recipe with outputs nor another output",
    "average nowhere --std 0.1": "nowhere: neither a recipe with outputs nor another output",
    "scaling demo-scaling": "no run has metrics below this root",
    "report demo": "recipe demo is not finished",
    "promote nosuch": "nosuch: no such registered model",
}
REFUSED = """
import sys
from flows.command.main import main
assert main(sys.argv[1:]) == 2
assert not {"torch", "prefect", "mlflow", "pyarrow"} & sys.modules.keys()
"""


@pytest.mark.parametrize(("arguments", "line"), REFUSALS.items())
def test_a_refusal_comes_before_anything_heavy_is_imported(arguments: str, line: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", REFUSED, *arguments.split(), "--root", str(tmp_path / "root")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ")
    assert line in done.stderr


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ditflow {code_version()}\n"
