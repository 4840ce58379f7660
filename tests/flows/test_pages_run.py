"""The pages run: every command and Python block of a page in its order, as a reader in a clone would, but smaller."""

import itertools
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from command_line import write_images
from pages import BLOCKS, REPOSITORY, Block, commands
from s3_endpoint import BUCKET, s3_server

from dit.convert.pretrained import HEADS
from dit.models.config import SIZES, DiTConfig
from dit.models.dit import DiT
from flows import perform, recipe_file
from flows.command.main import main
from flows.launch.spec import LocalLaunch
from storage.manifest import Manifest

SHAPE = {"depth": 1, "width": 32, "heads": 2}
Replacement = str | Callable[[re.Match[str]], str]
SMALLER: dict[str, Replacement] = {
    r"(\b(?:steps|every|\w+_every|milestones)(?:: |=)|count: |--step )([\d_]+)\b": lambda found: (
        f"{found[1]}{_fewer(int(found[2]))}"
    ),
    r"\bcount=\d+": "count=10",
    r"\bsize: \{.*?\}": "size: {depth: 1, width: 32, heads: 2}",
    r"\bbatch_size: [\d_]+": "batch_size: 16",
    r"\bresolution: (256|512)": "resolution: 32",
    r"\bnproc(: |=)8": r"nproc\g<1>1",
    r"(?<![\w./])/data/": "data/",
}
"""What is replaced in presets, in recipes of the pages and in commands. All else is run as it stands."""
PRINTED: dict[str, Callable[[re.Match[str]], str]] = {
    r"runs/(\w+)/<digest>": lambda found: f"runs/{found[1]}/{_newest(found[1]).folder_name}",
    r"1f0c8d2b9a7e4c5d8f6a3b2c1d0e9f8a": lambda _: str(_newest("train").provenance.mlflow_run_id),
    r"\b5c1f\b": lambda _: _newest("train").folder_name[:8],
    r"s3://bucket\b": lambda _: f"s3://{BUCKET}",
}
"""What a reader puts in the place of what the pages print."""
PICTURES = (
    "photographs",
    *(f"{name}/{split}" for name in ("data/flowers", "data/imagenet", "imagenet") for split in ("train", "val")),
)
"""Where a reader has pictures."""
GIVEN: dict[str, Callable[[Path], None]] = {
    "mine.yaml": lambda path: _write_recipe(path, "mine"),
    "other.yaml": lambda path: _write_recipe(path, "other"),
    "DiT-XL-2-256x256.pt": lambda path: _save_published(path),
    "SiT-XL-2-256x256.pt": lambda path: _save_published(path),
}
"""Files that a page takes for granted, unless it writes them itself."""
NOT_RUN = {
    ": make test": "runs this test",
    ": make up": "serves until it is stopped: command/test_up.py",
    ": ditflow up": "serves until it is stopped: command/test_up.py, command/test_up_people.py",
    ": ditflow worker": "serves until it is stopped: command/test_worker.py",
    ": ditflow deploy": "needs the server of `ditflow up`: command/test_up.py",
    "--pool gpu": "needs a worker: command/test_worker.py",
    "--parallel 4": "starts a process for each recipe: command/test_members.py",
    "kind: slurm": "needs a cluster: launch/test_slurm.py",
    "kind: kubernetes": "needs a cluster: launch/test_kubernetes.py",
    "kind: nodes": "needs several machines: launch/test_nodes.py, doctor/test_doctor_ranks.py",
    "kind: dask, address": "needs a cluster: test_shard_tasks.py",
    "kind: ray, address": "needs a cluster, and no test has one",
    ": ditflow doctor --root": "takes a minute: doctor/, command/test_doctor_command.py",
    "hf://": "needs Hugging Face",
    "VIRTUAL_imagenet256_labeled.npz": "needs the weights of Inception: command/test_evaluate_command.py",
    "weights-inception-2015-12-05-6726825d.pth": "the weights of Inception, which we may not distribute",
    "people.md: ditflow": "needs the servers of others: command/test_up_people.py",
    "people.md: python": "needs an MLflow that asks for passwords: command/test_up_people.py",
    "contributing/archive.md: python": "needs the diff above it: docs/test_additions.py",
    "contributing/extractor.md: python": "needs the diff above it: docs/test_additions.py",
    "contributing/model.md: python": "needs the diff above it: docs/test_additions.py",
    "contributing/process.md: python": "needs the diff above it: docs/test_additions.py",
    "contributing/sampler.md: python": "needs the diff above it: docs/test_additions.py",
    "report.md: ditflow scaling": "docs/tutorial/sweep.md runs it",
    ": mlflow models serve": "serves until it is stopped: registry/test_register.py",
    ": curl": "asks what is served: registry/test_register.py",
    ": pip install": "needs a package index",
    ": source .venv/bin/activate": "the environment is this one",
    ": .venv/bin/pre-commit install": "changes the clone of the repository",
    ": createuser": "needs Postgres: test_postgres.py",
    ": createdb": "needs Postgres: test_postgres.py",
    ": podman": "needs a network",
    ": while": "needs a cluster: launch/test_slurm.py",
    ": docker": "needs a network: command/test_deploy_files.py",
}
"""What is not run, by a part of its page and command, and why."""


def _written(block: Block) -> list[str]:
    """What a reader does with a block, as its page and one command each."""
    if block.kind == "sh":
        return [f"{block.page}: {shlex.join(words)}" for words in commands(block.text)]
    return [f"{block.page}: python"] if block.kind == "python" else []


def _is_run(line: str) -> bool:
    return not any(part in line for part in NOT_RUN)


LINES = [line for block in BLOCKS for line in _written(block)]
PAGES = list(dict.fromkeys(block.page for block in BLOCKS if any(map(_is_run, _written(block)))))


LONG = {
    f"docs/{name}.md" for name in ("how-to/averages", "how-to/train-longer", "tutorial/fine-tune", "tutorial/sweep")
}
"""Pages with many trainings or stages."""


def _fewer(count: int) -> int:
    return max(count // 20, 2) if count < 10_000 else 20


def smaller(text: str) -> str:
    for pattern, replacement in SMALLER.items():
        text = re.sub(pattern, replacement, text)
    return text


def _newest(stage: str) -> Manifest:
    made = sorted(Path("runs", stage).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return Manifest.read(str(made[-1].parent.absolute()))


def _write_recipe(path: Path, name: str) -> None:
    (text,) = [block.text for block in BLOCKS if block.kind == "yaml" and block.text.startswith("# mine.yaml\n")]
    path.write_text(smaller(text.replace("name: mine\n", f"name: {name}\n")), "utf-8")


def _save_published(path: Path) -> None:
    torch.save({"ema": DiT(DiTConfig(**SHAPE, input_size=8, num_classes=1000)).state_dict()}, path)


@pytest.fixture(scope="module", autouse=True)
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Presets of small numbers, published sizes that are small, and training in this process."""
    presets = tmp_path_factory.mktemp("package") / "recipes"
    presets.mkdir()
    (presets.parent / "demo").symlink_to(REPOSITORY / "flows" / "demo")
    for path in recipe_file.RECIPES.iterdir():
        (presets / path.name).write_text(smaller(path.read_text("utf-8")), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_file, "RECIPES", presets)
        patch.setattr(perform, "_runs_here", lambda stage, launcher: isinstance(launcher, LocalLaunch))
        patch.setitem(HEADS, SHAPE["width"], SHAPE["heads"])
        for name in ("S", "B", "L", "XL"):
            patch.setitem(SIZES, name, SHAPE)
        yield


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tracking_template: Path, prefect_api: str) -> Path:
    """A folder as a reader has it, after the demo."""
    folder = tmp_path_factory.mktemp("reader") / "clone"
    pictures = write_images(folder / "pictures")
    for label, name in enumerate(("automobile", "horse", "ship")):
        (pictures / f"class{label}").rename(pictures / name)
    links = dict.fromkeys(PICTURES, pictures) | {"stabilityai/sd-vae-ft-ema": REPOSITORY / "flows" / "demo" / "vae"}
    for name, target in (links | {"flows": REPOSITORY / "flows"}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)
    for root in ("runs", "other", "data/runs"):
        (folder / root).mkdir()
        shutil.copy(tracking_template, folder / root / "mlflow.db")
    with chdir(folder):
        run("make demo")
    return folder


@pytest.fixture
def here(clone: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the clone for one page."""
    folder = shutil.copytree(clone, tmp_path / "clone", symlinks=True)
    with chdir(folder):
        yield folder


def run(command: str) -> None:
    """Run a command of a page, as a process of its own would; it is done without a fault."""
    for pattern, value in PRINTED.items():
        command = re.sub(pattern, value, command)
    program, *words = shlex.split(smaller(command))
    if program == "export":
        os.environ |= dict(word.split("=", 1) for word in words)
        return
    if program == "make":
        given = [shlex.split(word.removeprefix("ARGS=")) for word in words[1:]]
        program, words = "ditflow", [words[0], *itertools.chain(*given)]
    assert program == "ditflow", f"{command}: neither run nor listed in NOT_RUN"
    with mock.patch.dict(os.environ):
        assert main(words) == 0, command


def _do(block: Block, names: dict[str, Any]) -> None:
    if block.kind == "yaml" and (name := re.match(r"# (\S+\.yaml)\n", block.text)):
        Path(name[1]).write_text(smaller(block.text), "utf-8")
    if block.kind == "python":
        exec(compile(smaller(block.text), block.place, "exec"), names)
    if block.kind == "sh":
        for words in commands(block.text):
            if _is_run(f"{block.page}: {shlex.join(words)}"):
                run(shlex.join(words))


@pytest.mark.parametrize("page", [pytest.param(page, marks=pytest.mark.full if page in LONG else ()) for page in PAGES])
def test_the_page_runs(page: str, here: Path) -> None:
    blocks = [block for block in BLOCKS if block.page == page]
    text = "".join(block.text for block in blocks)
    with ExitStack() as stack:
        for name, give in GIVEN.items():
            if name in text and f"init {name}" not in text and f"# {name}\n" not in text:
                give(here / name)
        if any(_is_run(line) and "s3://bucket" in line for line in LINES if line.startswith(page)):
            os.environ |= stack.enter_context(s3_server())
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks:
            if block.kind != "python" or _is_run(f"{page}: python"):
                _do(block, names)


@pytest.mark.parametrize("part", [*NOT_RUN, *GIVEN])
def test_what_is_listed_is_on_a_page(part: str) -> None:
    assert any(part in line for line in LINES)


@pytest.mark.parametrize("pattern", [*PRINTED, *SMALLER])
def test_what_is_replaced_is_on_a_page(pattern: str) -> None:
    assert any(re.search(pattern, block.text) for block in BLOCKS)
