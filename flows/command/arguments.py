"""What can be said to the command ``ditflow``. Imports nothing heavy, so that help comes at once."""

import argparse
import os
from typing import Any

STAGES = ("shard", "encode", "train", "sample", "evaluate", "register")
DEMOS = ("demo", "demo-diffit", "demo-scaling")
PORTS = range(1, 65536)
RECIPE = "name of a preset or path of a YAML file"


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``command`` in what it returns is the name of the command."""
    top = argparse.ArgumentParser(prog="ditflow", description="From images to a registered Diffusion Transformer.")
    commands = top.add_subparsers(required=True, metavar="command", dest="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--root", default=os.environ.get("DITFLOW_ROOT", "runs"), help="fsspec URL for all outputs")
    chosen = argparse.ArgumentParser(add_help=False)
    chosen.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as train.steps=2000")
    chosen.add_argument("--json", action="store_true", help="print one JSON object a recipe and nothing else")
    _add_pipelines(commands, shared, chosen)
    _add_up(commands, shared)
    _add_outcomes(commands, shared)
    command = commands.add_parser("plan", parents=[shared, chosen], help="what a recipe will cost, before it runs")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("--rates", metavar="FILE", help="YAML of another machine's rates (default: measured here)")
    command = commands.add_parser("verify", help="are outputs still what was committed? Damaged ones are withdrawn")
    command.add_argument("url", help="manifest or folder of an output, or a root of outputs")
    text = "read everything and compare hashes; sizes and commit records alone without"
    command.add_argument("--full", action="store_true", help=text)
    command = commands.add_parser("models", help="every model's parameters, compute and memory")
    command.add_argument("--latent", type=int, default=32, metavar="SIDE", help="in latent pixels (default: 32)")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    _add_convert(commands)
    return top


def _add_pipelines(commands: Any, shared: argparse.ArgumentParser, chosen: argparse.ArgumentParser) -> None:
    """The commands that run stages, all of a recipe or one."""
    work = argparse.ArgumentParser(add_help=False, parents=[shared, chosen])
    text = "run what is done again, beside the old output; a forced pipeline that is interrupted starts over"
    work.add_argument("--force", action="store_true", help=text)
    command = commands.add_parser("demo", parents=[work], help="the whole pipeline on scanned digits")
    command.add_argument("--recipe", default="demo", choices=DEMOS, help="which model (default: demo, a latent DiT)")
    command = commands.add_parser("run", parents=[work], help="the whole pipeline of a recipe, or all of a sweep")
    command.add_argument("recipe", help=RECIPE)
    for name in STAGES:
        command = commands.add_parser(name, parents=[work], help=f"the {name} stage of a recipe")
        command.add_argument("recipe", nargs="?" if name in ("sample", "evaluate") else None, help=RECIPE)
        command.set_defaults(source=None)
        if name != "shard":
            text = "manifest URL or MLflow run id of the stage before (default: the recipe's own)"
            command.add_argument("--from", dest="source", metavar="MANIFEST", help=text)
        if name == "sample":
            _add_checkpoint(command)
        if name == "evaluate":
            _add_samples(command)


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    """The options of sampling without a recipe."""
    group = command.add_argument_group("straight from a checkpoint", "draw a picture and an npz, with no recipe")
    text = "a trained model's folder, a published DiT's .pt or .safetensors file, or a diffusers folder"
    group.add_argument("--checkpoint", metavar="SOURCE", help=text)
    group.add_argument("--out", default="samples", help="folder for samples.png and samples.npz (default: samples)")
    group.add_argument("--vae", metavar="SOURCE", help="the autoencoder, where the checkpoint does not name it")
    group.add_argument("--heads", type=int, help="attention heads, where no published size has the width")


def _add_samples(command: argparse.ArgumentParser) -> None:
    """The options of evaluating without a recipe."""
    group = command.add_argument_group("any samples against any reference", "print metrics, with no recipe")
    group.add_argument("--samples", metavar="SOURCE", help="manifest of samples, folder of images, or npz with arr_0")
    group.add_argument("--reference", metavar="SOURCE", help="npz with arr_0 or mu and sigma, manifest, or folder")


def _add_up(commands: Any, shared: argparse.ArgumentParser) -> None:
    command = commands.add_parser("up", parents=[shared], help="Prefect, MLflow and a worker, with all flows deployed")
    command.add_argument("--recipe", default="demo", help="whose values fill the forms in the Prefect UI")
    command.add_argument("--prefect-port", type=int, default=4200, choices=PORTS, metavar="PORT")
    command.add_argument("--mlflow-port", type=int, default=5000, choices=PORTS, metavar="PORT")


def _add_outcomes(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands about what is done."""
    command = commands.add_parser("npz", help="samples to one npz file, as ADM's evaluation suite reads it")
    command.add_argument("samples", help="manifest of samples, or the folder that it lies in")
    command.add_argument("file", help="by path or URL, ending in .npz; not yet there")
    command = commands.add_parser("report", parents=[shared], help="a page to look at of a recipe that is done")
    command.add_argument("recipe", help=RECIPE)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as the recipe was run")
    text = "the distance against training FLOPs and GMAC over the finished runs of a sweep"
    command = commands.add_parser("scaling", parents=[shared], help=text)
    command.add_argument("recipe", nargs="+", help=f"{RECIPE}, of a sweep or of one run")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as the recipes were run")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    command = commands.add_parser("promote", parents=[shared], help="make a version of a registered model the champion")
    command.add_argument("model", help="name of the registered model")
    command.add_argument("version", nargs="?", type=int, help="default: the candidate")
    command.add_argument("--reason", default="", help="why, for the record in the version's tags")


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="a DiT checkpoint into another layout")
    command.add_argument("source", help=".pt or .safetensors file, diffusers folder, or trained model, by path or URL")
    text = ".safetensors or .pt file for --to reference, else a folder; not yet there"
    command.add_argument("destination", help=text)
    command.add_argument("--to", required=True, choices=("reference", "diffusers", "pipeline"))
    command.add_argument("--heads", type=int, help="attention heads, where no published size has the width")
    command.add_argument("--vae", metavar="SOURCE", help="folder, URL or hub id of the autoencoder for --to pipeline")
