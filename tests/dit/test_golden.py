"""Losses of twenty steps, kept from when they were checked against a plain loop.

A change that is not about numbers reproduces them. One that is writes them anew, and says why:
``python tests/dit/test_golden.py`` prints what `golden_losses.json` is to hold.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import synthetic
import tiny
import torch

from dit.diffusion.config import EDMConfig
from dit.models.choice import DiffiTImageChoice, ImageShape
from dit.training.config import TrainConfig

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20
COMMON = TrainConfig(steps=STEPS, batch_size=8, learning_rate=1e-3, seed=5, log_every=1)
LATENT = COMMON.model_copy(update={"model": tiny.MODEL, "ema_decay": 0.9})
PIXEL = COMMON.model_copy(
    update={
        "model": DiffiTImageChoice(
            size=ImageShape(stem_width=32, widths=(32, 32), depths=(1, 1), window=4, time_width=32),
            conditional=True,
            dropout=0.2,
        ),
        "diffusion": EDMConfig(),
        "warmup_steps": 10,
        "gradient_clip": 1.0,
        "augmentation": 0.3,
    }
)
RUNS = {"dit": (LATENT, synthetic.latents), "diffit_image": (PIXEL, synthetic.pixels)}


def losses(name: str, folder: Path) -> list[float]:
    """The loss of each step."""
    config, store = RUNS[name]
    recorder = tiny.Recorder()
    tiny.run_train(folder, config, store(folder), recorder)
    return [recorder.values[step]["loss"] for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_as_kept_and_the_same_bits_again(tmp_path: Path, name: str) -> None:
    """Within what another processor's order of sums makes of them; twice on one processor they are equal."""
    first, second = losses(name, tmp_path / "first"), losses(name, tmp_path / "second")
    assert first == second
    assert first == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: losses(name, Path(folder, name)) for name in RUNS}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
