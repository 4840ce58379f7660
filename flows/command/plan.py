"""``ditflow plan``: what a recipe will cost, and whether it fits."""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from math import inf, nan
from typing import TYPE_CHECKING

from flows.command.options import add_json, add_recipe, add_root, add_set
from flows.command.tables import aligned
from storage.errors import InputError

if TYPE_CHECKING:
    from flows.plan.table import Plan

HELP = "estimate what a recipe will cost before it runs"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_recipe(parser)
    text = "YAML file with the rates of another machine (default: measured on this one)"
    parser.add_argument("--rates", metavar="FILE", help=text)
    text = "price of an hour of a device, a GPU or what else one rank works on: the plan says the money too"
    parser.add_argument("--price", metavar="PRICE", type=_price, help=text)
    add_root(parser)
    add_set(parser)
    add_json(parser)


def run(options: Namespace) -> None:
    """Print the plan; fail if the recipe does not fit."""
    from flows.plan.estimate import plan, read_rates
    from flows.sweep import load_recipes

    rates = read_rates(options.rates)
    recipes = load_recipes(options.recipe, options.set, options.root)
    plans = [plan(recipe, options.root, rates, options.price) for recipe in recipes]
    for estimate in plans:
        for line in [json.dumps(estimate.as_json())] if options.json else _lines(estimate):
            print(line)
    problems = [problem for estimate in plans for problem in estimate.problems]
    if problems:
        raise InputError("; ".join(dict.fromkeys(problems)))


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = nan
    if not 0 <= price < inf:
        raise ArgumentTypeError(f"{text}: must be a number of at least 0, without a currency, such as 2.5")
    return price


def _lines(estimate: "Plan") -> Iterator[str]:
    yield estimate.recipe
    yield from aligned(estimate.archive)
    yield from aligned(estimate.rows(), numbers=range(2, 8))
    yield from estimate.needs()
