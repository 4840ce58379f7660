"""The command ``ditflow``. Exits with 0 when done, 2 if the user's input is wrong, 1 at a fault, 75 if preempted."""

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from flows import servers
from flows.command.arguments import STAGES, parser
from flows.command.prefect_server import serving_prefect
from storage import uri
from storage.errors import DitflowError, InputError, PreemptedError, StorageError

# Prefect reads its settings when it is imported, so whatever imports it is imported after they are set.
if TYPE_CHECKING:
    from flows.contract import Outcome
    from flows.recipe import Recipe
    from storage.manifest import Manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    options = parser().parse_args(arguments)
    servers.bypass_proxy()
    try:
        if "root" in options and getattr(options, "checkpoint", None) is None:
            _check_root(options)
        COMMANDS[options.command](options)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except PreemptedError as error:
        sys.stderr.write(f"preempted: {error}\n")
        return PreemptedError.EXIT_CODE
    except DitflowError as error:
        sys.stderr.write(f"fault: {error}\n")
        return 1
    except BrokenPipeError:  # who reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where it was\n")
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def demo(options: argparse.Namespace) -> None:
    """Run the demo's pipeline on scanned digits."""
    from flows.demo.digits import write_digits

    write_digits(servers.local_home(options.root) / "digits")
    run(options)


def run(options: argparse.Namespace) -> None:
    """Run a recipe's pipeline, or one after the other those of a sweep."""
    from flows.sweep import load_recipes

    todo: list[Recipe] = []
    for recipe in load_recipes(options.recipe, options.set, options.root):
        done = None if options.force else recipe.finished(options.root)
        if done is None:
            todo.append(recipe)
            continue
        from flows.report import page
        from flows.tracking import runs

        runs.settle_unsent(done, options.root)
        page.settle(recipe.name, done, options.root)
        _report(options, recipe, _skipped(done))
    if not todo:
        return
    with serving_prefect(options.root, quiet=options.json):
        from flows.perform import RunSettings
        from flows.pipeline import pipeline

        for recipe in todo:
            _report(options, recipe, pipeline(recipe, RunSettings(root=options.root, force=options.force)))


def stage(options: argparse.Namespace) -> None:
    """Run one stage of a recipe on an earlier output."""
    recipe = _recipe(options)
    source = recipe.source_of(options.command, options.source, options.root)
    with serving_prefect(options.root, quiet=options.json):
        from flows.perform import RunSettings
        from flows.pipeline import run_stage

        settings = RunSettings(root=options.root, force=options.force)
        _report(options, recipe, [run_stage(options.command, recipe, source, settings)])


def sample(options: argparse.Namespace) -> None:
    """Run a recipe's sample stage, or draw straight from a checkpoint."""
    if (options.recipe is None) == (options.checkpoint is None):
        raise InputError("sample: name a recipe, or give --checkpoint")
    if options.recipe:
        stage(options)
        return
    from flows.command.sample import draw

    for place in draw(options.checkpoint, options.set, options.out, vae=options.vae, heads=options.heads):
        print(place)


def evaluate(options: argparse.Namespace) -> None:
    """Run a recipe's evaluate stage, or compare any samples with any reference."""
    alone = (options.samples, options.reference)
    if (options.recipe is None) != all(alone) or any(alone) != all(alone):
        raise InputError("evaluate: name a recipe, or give --samples and --reference")
    if options.recipe:
        stage(options)
        return
    from flows.command.evaluate import judged

    print(judged(*alone, options.set, options.root, as_json=options.json))


def npz(options: argparse.Namespace) -> None:
    """Write samples to one npz."""
    from dit.write_npz import write_npz
    from flows.tracking.progress import StageProgress
    from flows.tracking.sink import StageTracker

    with StageProgress("npz").shown() as progress:
        write_npz(options.samples, options.file, StageTracker(None, progress.update))
    print(uri.redact(options.file))


def promote(options: argparse.Namespace) -> None:
    """Make a model version the champion."""
    from flows.registry.promotion import promote

    print(promote(options.model, options.version, options.reason, options.root))


def report(options: argparse.Namespace) -> None:
    """Write the report of a recipe that is done, if it is not there."""
    from flows.report.page import write_page

    recipe = _recipe(options)
    done = recipe.finished(options.root)
    if done is None:
        raise InputError(f"report: recipe {recipe.name} is not done; run it first")
    print(write_page(recipe.name, done, options.root))


def scaling(options: argparse.Namespace) -> None:
    """Fit how the distance falls with compute over the finished runs of a sweep."""
    from flows.command.scaling import scaling

    found = scaling(options.recipe, options.set, options.root)
    for line in [found.as_json()] if options.json else found.lines():
        print(line)


def up(options: argparse.Namespace) -> None:
    """Serve Prefect, MLflow and a worker until Ctrl-C."""
    from flows.command.up import serve

    serve(options.root, options.recipe, prefect_port=options.prefect_port, mlflow_port=options.mlflow_port)


def plan(options: argparse.Namespace) -> None:
    """Say what a recipe will cost; refuse what cannot fit."""
    from flows.plan.estimate import plan as reckon
    from flows.plan.estimate import read_rates
    from flows.sweep import load_recipes

    rates = read_rates(options.rates)
    plans = [reckon(recipe, options.root, rates) for recipe in load_recipes(options.recipe, options.set, options.root)]
    for found in plans:
        for line in [json.dumps(found.as_json())] if options.json else found.table():
            print(line)
    problems = [problem for found in plans for problem in found.problems]
    if problems:
        raise InputError("; ".join(dict.fromkeys(problems)))


def verify(options: argparse.Namespace) -> None:
    """See that outputs are what was committed; take back those that are not."""
    from storage.verify import outputs

    damaged = [manifest for manifest in outputs(options.url) if _damaged(manifest, full=options.full)]
    if damaged:
        raise StorageError("run the commands that made what is damaged again: they redo that and nothing else")


def _damaged(manifest: "Manifest", *, full: bool) -> bool:
    """Print how an output is, and take it back if it is damaged."""
    from storage.verify import faults, withdraw

    found, where = faults(manifest, full=full), uri.redact(manifest.uri)
    for fault in found:
        print(f"{uri.join(where, fault.entry.path)}: {fault.damage}")
    if found:
        withdraw(manifest, found)
    seen = "all bytes" if full else "sizes and records"
    state = f"{len(found):,} damaged, withdrawn" if found else f"{seen} as committed"
    size = sum(entry.size for entry in manifest.files)
    print(f"{where}: {len(manifest.files):,} objects, {size:,} bytes: {state}", flush=True)
    return bool(found)


def models(options: argparse.Namespace) -> None:
    """Print what each model costs."""
    from flows.command import models

    for line in [models.as_json(options.latent)] if options.json else models.table(options.latent):
        print(line)


def convert(options: argparse.Namespace) -> None:
    """Write a DiT of one layout in another."""
    from dit.convert import read, summary, write

    found = read(options.source, heads=options.heads)
    write(found, options.destination, options.to, vae=options.vae)
    print(summary(found, options.destination, options.to))


def _recipe(options: argparse.Namespace) -> "Recipe":
    from flows.recipe import load_recipe

    return load_recipe(options.recipe, options.set, options.root)


def _check_root(options: argparse.Namespace) -> None:
    root = options.root
    try:
        home = uri.local_path(uri.without_credentials(root))
        if home is None:
            uri.exists(root)
            return
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK):
            raise InputError("cannot be written to")
    except Exception as error:  # stores of all kinds have their own ways to say no
        raise InputError(f"--root {uri.redact(root)}: {getattr(error, 'strerror', None) or error}") from error


def _skipped(manifests: "list[Manifest]") -> "list[Outcome]":
    from flows.contract import Outcome

    return [Outcome(found.stage, "skipped", 0.0, found.url) for found in manifests]


def _report(options: argparse.Namespace, recipe: "Recipe", outcomes: "list[Outcome]") -> None:
    from flows.command.outcomes import as_json, show

    if options.json:
        print(json.dumps({"recipe": recipe.name} | as_json(outcomes, options.root)), flush=True)
    else:
        show(recipe.name, outcomes, options.root)


def _terminated(*_: Any) -> NoReturn:
    raise SystemExit(143)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    **dict.fromkeys(STAGES, stage),
    "demo": demo,
    "run": run,
    "sample": sample,
    "evaluate": evaluate,
    "up": up,
    "npz": npz,
    "report": report,
    "scaling": scaling,
    "promote": promote,
    "plan": plan,
    "verify": verify,
    "models": models,
    "convert": convert,
}


if __name__ == "__main__":
    sys.exit(main())
