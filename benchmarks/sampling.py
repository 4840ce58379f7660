"""Distance of samples against passes of the network: the demo's digits, with the samplers of both its processes.

    python -m benchmarks.sampling --root runs --plot sampling.png

trains the recipes ``demo`` and ``demo-flow`` in the root, unless they are there, and goes on where it was ended.
All samples are guided alike; a guided pass counts once.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.common import machine
from dit.diffusion.config import ProcessConfig
from dit.evaluate import MetricsManifest
from dit.export import CheckpointManifest
from dit.samplers.config import SampleConfig
from dit.samplers.table import sampler
from flows.contract import STAGES, Source
from flows.demo.digits import write_digits
from flows.recipe import Recipe, load_recipe
from storage.config import Config
from storage.tracker import NullTracker

STEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "demo": {"ddpm": (5, 10, 25, 50), "ddim": (5, 10, 25), "dpm++": (5, 10, 25)},
    "demo-flow": {"euler": (5, 10, 25), "heun": (3, 5, 13), "euler_maruyama": (5, 10, 25)},
}
"""By recipe and sampler."""
GUIDANCE = 2.0
"""The scale, for both processes."""
TOLERANCES = (1e-1, 1e-2, 1e-3)
"""``rtol`` of dopri5; its ``atol`` is a thousandth of that, as in its defaults."""


def measure(root: str, count: int) -> list[dict[str, Any]]:
    """A row for each sampler and setting: passes of the network, distance and its 95 % interval."""
    write_digits(Path(root, "digits"))
    rows = []
    for name, samplers in STEPS.items():
        recipe = _recipe(name, root)
        checkpoint = _trained(recipe, root)
        settings = [{"sampler": each, "steps": n} for each, steps in samplers.items() for n in steps]
        if name == "demo-flow":
            settings += [{"sampler": "dopri5", "rtol": rtol, "atol": rtol / 1000} for rtol in TOLERANCES]
        rows += [_row(recipe, checkpoint, setting | {"count": count}, root) for setting in settings]
    return rows


def plot(rows: list[dict[str, Any]]) -> Figure:
    """The distances against the passes, on a logarithmic axis."""
    figure = Figure(figsize=(6.5, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["sampler"] for row in rows):
        mine = [row for row in rows if row["sampler"] == name]
        passes, values, margins = ([row[key] for row in mine] for key in ("nfe", "distance", "margin"))
        flow = mine[0]["process"] == "flow"
        style, label = "s--" if flow else "o-", f"{name} ({mine[0]['process']})"
        axes.errorbar(passes, values, margins, fmt=style, capsize=2, markersize=4, linewidth=1, label=label)
    axes.set(xlabel="passes of the network", ylabel=rows[0]["name"], xscale="log")
    axes.set_xticks([5, 10, 20, 50, 100], labels=["5", "10", "20", "50", "100"])
    axes.set_xticks([], minor=True)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _recipe(name: str, root: str) -> Recipe:
    splits = [f"archive.{split}={Path(root, 'digits', split)}" for split in ("train", "held_out")]
    return load_recipe(name, splits)


def _trained(recipe: Recipe, root: str) -> CheckpointManifest:
    source: Source = recipe.archive
    for name in ("shard", "encode", "train"):
        source = _made(name, recipe.config_of(name), source, root)
    assert isinstance(source, CheckpointManifest)
    return source


def _row(recipe: Recipe, checkpoint: CheckpointManifest, fields: dict[str, Any], root: str) -> dict[str, Any]:
    values = recipe.config_of("sample").model_dump() | fields | {"guidance_scale": GUIDANCE}
    config, process = SampleConfig.model_validate(values), checkpoint.card.diffusion
    samples = _made("sample", config, checkpoint, root)
    metrics = _made("evaluate", recipe.config_of("evaluate"), samples, root)
    assert isinstance(metrics, MetricsManifest)
    return {
        "process": process.kind,
        "sampler": config.sampler,
        "nfe": metrics.conditions.get("nfe", _passes(config, process)),
        "name": metrics.distance,
        "distance": metrics.estimate.value,
        "margin": metrics.estimate.margin,
    }


def _passes(config: SampleConfig, process: ProcessConfig) -> int:
    return sampler(config, process).passes(config.steps)


def _made(name: str, config: Config, source: Source, root: str) -> Any:
    """The stage's output, made now unless it is there."""
    stage = STAGES[name]
    out = stage.output(root, config, source)
    return out.committed(stage.kind) or stage.run(config, source, out=out, tracker=NullTracker())


def main() -> None:
    """Measure, write the plot, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="runs/sampling", help="folder of all outputs (default: runs/sampling)")
    parser.add_argument("--count", type=int, default=500, help="images of each sampler and setting (default: 500)")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = measure(options.root, options.count)
    if options.plot:
        FigureCanvasAgg(plot(rows)).print_png(str(options.plot))
    if options.json:
        print(json.dumps({"machine": machine(), "count": options.count, "rows": rows}))
        return
    for row in rows:
        print(f"{row['sampler']:<16} {row['nfe']:8.1f} passes {row['distance']:9.2f} ± {row['margin']:.2f}")


if __name__ == "__main__":
    main()
