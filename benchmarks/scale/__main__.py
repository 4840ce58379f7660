"""``python -m benchmarks.scale``: the whole pipeline on as many small images as ImageNet has.

Each number of images is written as ImageNet is published, planned, run, verified, and run again, by the commands that
a user types. For each stage it prints what it took and what the plan had said.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import machine
from benchmarks.scale.data import CLASSES, HELD_OUT, SIDE, Pictures, write, write_autoencoder
from benchmarks.scale.table import Line, growth, table
from benchmarks.scale.watch import Watched, watch
from flows.contract import STAGES

IMAGES = 1_281_167
CLASSIFIER = Path(__file__).parents[2] / "flows" / "demo" / "classifier"


def main() -> None:
    """Measure each number of images, and print tables or one JSON object."""
    options = _options()
    pictures, found = Pictures(options.pictures), dict[int, list[Line]]()
    for images in options.images:
        folder = options.folder / str(images)
        lines = measure(folder, images, options.held_out, options.classes, options.samples, pictures)
        found[images] = lines
        (options.folder / f"{images}.json").write_text(json.dumps([asdict(line) for line in lines], indent=1))
        if not options.keep:
            shutil.rmtree(folder)
        if not options.json:
            print(f"{images:,} images", table(lines), sep="\n", flush=True)
    ratios = growth(found)
    if options.json:
        results = {images: [asdict(line) for line in lines] for images, lines in found.items()}
        print(json.dumps({"machine": machine(), "results": results, "ratios": ratios}))
    else:
        print(*(f"{name:<32} {ratio:8.3f} x" for name, ratio in ratios.items()), sep="\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[50_000, IMAGES], help="numbers of training images")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="number of held-out images")
    parser.add_argument("--classes", type=int, default=CLASSES, help="number of classes")
    parser.add_argument("--samples", type=int, default=50_000, help="number of samples to draw and measure")
    parser.add_argument("--pictures", type=Path, help="a zip of small JPEGs, such as CIFAR-10's (default: made ones)")
    parser.add_argument("--folder", type=Path, default=Path("scale"), help="where everything is written")
    parser.add_argument("--keep", action="store_true", help="keep archives and outputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def measure(folder: Path, images: int, held_out: int, classes: int, samples: int, pictures: Pictures) -> list[Line]:
    """Write an archive, and plan, run, verify and run it again."""
    archive = write(folder, images, held_out, pictures, classes)
    write_autoencoder(folder / "vae")
    recipe, root = folder / "scale.yaml", folder / "root"
    recipe.write_text(yaml.safe_dump(_recipe(archive, folder / "vae", samples), sort_keys=False))
    given = (str(recipe), "--root", str(root), "--json")
    planned = _command("plan", *given)
    ran = _command("run", *given, phase=partial(_stage, root))
    verified = _command("verify", "--full", str(root))
    again = _command("run", *given)
    states = {stage["state"] for stage in json.loads(again.output)["stages"]}
    if states != {"skipped"}:
        raise ValueError(f"the second run was to skip every stage, but they are {states}")
    lines = _stages(root, json.loads(planned.output)["lines"], ran)
    commands = {"plan": planned, "run": ran, "verify --full": verified, "run again": again}
    lines += [_line(name, images, watched) for name, watched in commands.items()]
    return [*lines, Line("read all manifests", images, _reading(root), 0.0, {})]


def _command(*arguments: str, phase: Any = lambda: "") -> Watched:
    return watch([sys.executable, "-m", "flows.command.main", *arguments], phase)


def _recipe(archive: dict[str, str], vae: Path, samples: int) -> dict[str, Any]:
    """Everything tiny but the number of images."""
    model = {"kind": "dit", "size": {"depth": 2, "width": 32, "heads": 2}, "patch_size": 2}
    return {
        "name": "scale",
        "archive": archive,
        "encode": {"vae": {"source": str(vae)}, "resolution": SIDE, "batch_size": 64, "flips": False},
        "train": {
            "model": model,
            "steps": 200,
            "batch_size": 256,
            "flips": False,
            "log_every": 50,
            "checkpoint_every": 100,
        },
        "launch": {"nproc": 2},
        "sample": {
            "count": samples,
            "sampler": "ddim",
            "steps": 4,
            "guidance_scale": 1.0,
            "batch_size": 256,
            "decode_batch_size": 64,
        },
        "evaluate": {"extractor": {"name": "demo-digits", "weights": str(CLASSIFIER)}},
        "registry": {"model_name": "scale"},
    }


def _stage(root: Path) -> str:
    """The stage that a first run is at: the first one without a manifest."""
    return next((name for name in STAGES if name != "average" and not _manifests(root, name)), "end")


def _manifests(root: Path, stage: str) -> list[Path]:
    return list((root / stage).glob("*/manifest.json"))


def _stages(root: Path, planned: list[dict[str, Any]], ran: Watched) -> list[Line]:
    """The stages of the first run."""
    plans = {line["stage"]: line for line in planned}
    return [
        _stage_line(outcome["name"], outcome["seconds"], Path(outcome["manifest"]), plans.get(outcome["name"], {}), ran)
        for outcome in json.loads(ran.output)["stages"]
    ]


def _stage_line(name: str, seconds: float, manifest: Path, plan: dict[str, Any], ran: Watched) -> Line:
    made = json.loads(manifest.read_bytes())
    files = [path for path in manifest.parent.rglob("*") if path.is_file()]
    measured = sum(made["counts"].get(part, 0) for part in ("reference", "samples", "samples", "floor"))
    return Line(
        name,
        measured or made["counts"].get("images", 0),
        seconds,
        ran.processor[name],
        dict(ran.peaks[name]),
        len(files),
        sum(path.stat().st_size for path in files),
        manifest.stat().st_size,
        3600 * plan["hours"] if plan else None,
        plan.get("objects"),
        plan.get("size"),
    )


def _line(name: str, images: int, watched: Watched) -> Line:
    peaks: dict[str, int] = {}
    for kinds in watched.peaks.values():
        peaks |= {kind: max(peak, peaks.get(kind, 0)) for kind, peak in kinds.items()}
    return Line(name, images, watched.seconds, sum(watched.processor.values()), peaks)


def _reading(root: Path) -> float:
    """Seconds to read and check all manifests of a root."""
    begin = time.perf_counter()
    for name, stage in STAGES.items():
        for path in _manifests(root, name):
            stage.kind.read(str(path))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
