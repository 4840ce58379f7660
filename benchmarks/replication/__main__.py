"""Tables and plots of the sweeps in this folder, from their finished runs.

for sweep in benchmarks/replication/*.yaml; do ditflow run $sweep --root runs; done
python -m benchmarks.replication --root runs --pictures docs/replication > tables.md
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.replication.drawing import against, by_variant
from benchmarks.replication.runs import Run, finished, over_seeds
from dit.report import plots
from dit.report.plots import GuidanceLine

Runs = Callable[[str], list[Run]]
"""Gives the finished runs of a sweep."""
Figure = tuple[list[Run], bytes]
"""The runs of a table, and the plot."""


def blocks(runs: Runs) -> Figure:
    """DiT, figure 5: the distance by the kind of block."""
    found = runs("blocks")
    return found, by_variant(found)


def sizes(runs: Runs) -> Figure:
    """DiT, figures 6 and 8: the distance against the multiply-accumulates of a forward pass."""
    found = runs("sizes") + runs("patches")
    last = [run for run in found if run.steps == max(each.steps for each in found)]
    return last, against("GMAC of a forward pass", lambda run: run.gmac, _groups(last, lambda run: run.size))


def training_compute(runs: Runs) -> Figure:
    """DiT, figure 9: the distance against the compute of training, at two steps of each model."""
    found = runs("sizes") + runs("patches")
    groups = _groups(found, lambda run: run.model)
    return found, against("FLOPs of training", lambda run: run.training_flops, groups)


def sampling_compute(runs: Runs) -> Figure:
    """DiT, figure 10: the distance against the compute of sampling an image."""
    found = runs("sampling_steps")
    groups = _groups(found, lambda run: run.model)
    return found, against("GMAC of sampling an image", lambda run: run.sampling_gmac, groups)


def guidance(runs: Runs) -> Figure:
    """Distance, precision and recall against the scale of classifier-free guidance."""
    found = runs("guidance")
    line = GuidanceLine(
        found[0].model,
        [run.guidance_scale for run in found],
        [run.distance for run in found],
        [run.metrics.metrics["precision_fp32"] for run in found],
        [run.metrics.metrics["recall_fp32"] for run in found],
    )
    return found, plots.guidance([line], found[0].metrics.distance)


def conditions(runs: Runs) -> Figure:
    """DiffiT, tables 5 and 6: where time and class enter a block."""
    found = runs("conditions")
    return found, by_variant(found)


def processes(runs: Runs) -> Figure:
    """SiT, table 1: the same network trained by DDPM's process and as a flow."""
    found = [run for run in runs("blocks") if run.variant == "dit adaln_zero"] + runs("process")
    return found, by_variant(found)


FIGURES = (blocks, sizes, training_compute, sampling_compute, guidance, conditions, processes)


def _groups(runs: Sequence[Run], name: Callable[[Run], str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(name(run), []).append(run)
    return groups


def main() -> None:
    """Print the tables and write the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs", help="folder of all outputs (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, default=Path("docs/replication"), help="folder for the plots")
    parser.add_argument("--only", choices=[figure.__name__ for figure in FIGURES], help="one figure (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for ditflow run")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    for figure in FIGURES:
        if options.only in (None, figure.__name__):
            runs, picture = figure(lambda sweep: finished(sweep, options.set, options.root))
            (options.pictures / f"{figure.__name__}.png").write_bytes(picture)
            print("", figure.__doc__, "", Run.HEADER, *(run.row() for run in runs), sep="\n")
            if len({run.seed for run in runs}) > 1:
                means = (f"| {variant} | {mean} |" for variant, mean in over_seeds(runs).items())
                print("", "| variant | mean FD of the seeds (95 %, of seeds) |", "|---|---|", *means, sep="\n")


if __name__ == "__main__":
    main()
