"""Measures the loss on held-out images as training does, of weights that are the same on any number of ranks."""

import json

import torch

from dit.devices import arithmetic
from dit.ranks import joined
from dit.train import card_for
from dit.training.config import TrainConfig
from dit.training.held_out import open_held_out
from dit.training.parallelize import local
from dit.training.start import initial_state
from storage.latents import LatentManifest
from storage.manifest import StageOutput
from storage.tracker import Tracker

NUMBERS = "numbers.json"


def run(config: TrainConfig, latents: LatentManifest, *, out: StageOutput, tracker: Tracker) -> None:
    """Write the numbers of two measurements."""
    with joined() as ranks, arithmetic(config.precision):
        card = card_for(config, latents)
        state = initial_state(config, card, ranks)
        held_out = open_held_out(config, card, latents, ranks)
        assert held_out is not None
        with torch.no_grad():
            for number, parameter in enumerate(state.model.parameters()):
                local(parameter).add_(0.01 * (1 + number % 3))
        state.averages["ema"].update(state.model, 0)
        found = [held_out.measure(state) for _ in range(2)]
        if ranks.first:
            out.put(NUMBERS, json.dumps(found).encode())
        ranks.wait()
