"""The attention on the way from noise, against weights written out, and how it is drawn."""

import io
from pathlib import Path

import numpy as np
import pytest
import synthetic
import tiny
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dit.diffusion.config import DiffusionConfig, EDMConfig, FlowConfig, ProcessConfig
from dit.models.choice import DiffiTChoice, DiffiTImageChoice, ImageShape, ModelChoice, Shape
from dit.models.config import ConditionKind
from dit.models.tmsa import TMSA
from dit.report import plots
from dit.report.attention import SHOWN, Given, Layer, attention, measured
from dit.sample import SampleManifest
from dit.samplers.config import SampleConfig
from dit.samplers.table import FITTING
from dit.training.config import TrainConfig
from storage.latents import LatentManifest

WIDTH, HEADS, E, WINDOW = 24, 4, 10, 2
N = WINDOW**2
LATENT = DiffiTChoice(size=Shape(depth=4, width=32, heads=2), condition="token")
PIXEL = DiffiTImageChoice(
    size=ImageShape(stem_width=32, widths=(32, 32), depths=(1, 1), window=4, time_width=32), conditional=True
)


def drawn(condition: ConditionKind) -> TMSA:
    layer = TMSA(WIDTH, HEADS, E, WINDOW, condition)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.requires_grad_(False)


def weights(layer: TMSA, x: Tensor, c: Tensor, condition: ConditionKind) -> NDArray[np.float64]:
    """Softmax weights (h, N, K) of one window in float64, written out."""
    layer = layer.double()
    x, c = x.double(), c.double()
    if condition == "token":
        assert layer.time_token is not None
        x = torch.cat([x, layer.time_token(c)[None]])
    qkv = layer.qkv(x) + (layer.time_qkv(c) if layer.time_qkv is not None else 0)
    q, k, _ = qkv.unflatten(1, (3, HEADS, -1)).unbind(1)
    logits = torch.einsum("ihd,jhd->hij", q[:N], k) / (WIDTH // HEADS) ** 0.5
    logits[:, :, :N] += layer.bias()
    found: NDArray[np.float64] = (logits.exp() / logits.exp().sum(2, keepdim=True)).numpy()
    layer.float()
    return found


@pytest.mark.parametrize("condition", ["tmsa", "mlp", "token"])
def test_numbers_are_those_of_plain_loops(condition: ConditionKind) -> None:
    """Two images of four windows."""
    layer, now, before = drawn(condition), *(Given(torch.randn(8, N, WIDTH), torch.randn(2, E)) for _ in range(2))
    received, numbers = measured(layer, now, before)
    places = [(i // WINDOW, i % WINDOW) for i in range(N)]
    for image in range(2):
        entropies, distances, changed, moved = [], [], [], []
        for window in range(4):
            row = 4 * image + window
            w = weights(layer, now.x[row], now.c[image], condition)
            earlier = weights(layer, before.x[row], before.c[image], condition)
            untold = weights(layer, now.x[row], before.c[image], condition)
            for h in range(HEADS):
                for i in range(N):
                    far = [np.hypot(*np.subtract(places[i], places[j])) for j in range(N)]
                    entropies.append(-sum(share * np.log(share) for share in w[h, i]))
                    distances.append(np.dot(w[h, i, :N], far) / w[h, i, :N].sum())
                    changed.append(np.abs(w[h, i] - earlier[h, i]).sum() / 2)
                    moved.append(np.abs(w[h, i] - untold[h, i]).sum() / 2)
            if image == 0:
                top, left = window // 2 * WINDOW, window % 2 * WINDOW
                expected = w[:, :, :N].sum(1).mean(0).reshape(WINDOW, WINDOW)
                place = received[top : top + WINDOW, left : left + WINDOW]
                np.testing.assert_allclose(place, expected, rtol=1e-4)
        assert numbers["tokens"][image] == pytest.approx(np.exp(np.mean(entropies)), rel=1e-4)
        assert numbers["distance"][image] == pytest.approx(np.mean(distances), rel=1e-4)
        assert numbers["changed"][image] == pytest.approx(np.mean(changed), rel=1e-3)
        assert numbers["moved"][image] == pytest.approx(np.mean(moved), rel=1e-3, abs=1e-6)
    assert received.shape == (2 * WINDOW, 2 * WINDOW)
    assert (numbers["moved"] == 0).all() == (condition == "mlp")


def test_uniform_attention_looks_at_all_tokens() -> None:
    layer = drawn("tmsa")
    for parameter in layer.parameters():
        parameter.zero_()
    received, numbers = measured(layer, *(Given(torch.randn(1, N, WIDTH), torch.randn(1, E)) for _ in range(2)))
    np.testing.assert_allclose(received, 1, rtol=1e-6)
    expected = {"tokens": 4, "distance": (0 + 1 + 1 + 2**0.5) / 4, "changed": 0, "moved": 0}
    assert {name: values.item() for name, values in numbers.items()} == pytest.approx(expected)


def test_estimates_are_means_with_students_interval() -> None:
    layer = Layer("x", np.zeros((2, 1, 1), np.float32), {"moved": np.array([[1.0, 3.0], [2.0, 2.0]])})
    first, second = layer.estimates("moved")
    margin = 12.706 * 2**0.5 / 2**0.5
    assert (first.value, first.low, first.high) == pytest.approx((2, 2 - margin, 2 + margin), rel=1e-4)
    assert (second.low, second.high) == (2, 2)
    (alone,) = Layer("x", layer.received, {"moved": np.array([[1.0]])}).estimates("moved")
    assert (alone.value, alone.low) == (1, None)


def sampled(root: Path, choice: ModelChoice, process: ProcessConfig, data: LatentManifest) -> SampleManifest:
    config = TrainConfig(model=choice, diffusion=process, steps=2, batch_size=8, learning_rate=1e-2)
    fitting = FITTING[process.kind] | {"count": 5, "labels": "balanced", "guidance_scale": 2, "steps": 3}
    return tiny.run_sample(root, SampleConfig.model_validate(fitting), tiny.run_train(root, config, data))


PROCESSES = {
    "gaussian": (DiffusionConfig(), "ddim in 15 steps", ("t 999", "t 0")),
    "edm": (EDMConfig(), "heun in 15 steps", ("sigma 80", "sigma 0.002")),
    "flow": (FlowConfig(), "euler in 15 steps", ("t 0.00", "t 0.93")),
}


@pytest.mark.parametrize("kind", PROCESSES)
def test_way_of_every_process_and_its_picture(tmp_path: Path, kind: str) -> None:
    process, way, times = PROCESSES[kind]
    found = attention(sampled(tmp_path, PIXEL, process, synthetic.pixels(tmp_path)))
    assert found is not None
    assert (found.way, found.samples) == (way, 5)
    assert (found.times[0], found.times[-1], len(found.times)) == (*times, SHOWN)
    assert found.noisy.shape == found.expected.shape == (SHOWN, 16, 16, 3)
    assert [layer.name for layer in found.layers] == [
        "layer 1 of 3: 16 x 16 tokens in windows of 4 x 4",
        "layer 2 of 3: 8 x 8 tokens in windows of 4 x 4",
        "layer 3 of 3: 16 x 16 tokens in windows of 4 x 4",
    ]
    assert [layer.received.shape for layer in found.layers] == [(SHOWN, side, side) for side in (16, 8, 16)]
    for layer in found.layers:
        assert all(values.shape == (SHOWN, 5) for values in layer.numbers.values())
        for name in ("changed", "moved"):
            assert (layer.numbers[name][0] == 0).all()
            assert (layer.numbers[name][1:] > 0).all()
    picture = Image.open(io.BytesIO(plots.attention(found)))
    assert picture.width > picture.height / 2 > 200


def test_latents_are_decoded_and_other_models_have_no_such_attention(
    tmp_path: Path, latents: LatentManifest, samples: SampleManifest
) -> None:
    found = attention(sampled(tmp_path, LATENT, DiffusionConfig(), latents))
    assert found is not None
    assert found.expected.shape == (SHOWN, tiny.SIDE, tiny.SIDE, 3)
    assert [layer.name for layer in found.layers] == [f"layer {n} of 4: 4 x 4 tokens" for n in (1, 3, 4)]
    assert all((layer.received.sum((1, 2)) < 16).all() for layer in found.layers)  # the token has its share
    assert attention(samples) is None
