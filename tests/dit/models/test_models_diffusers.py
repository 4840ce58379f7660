"""The model against an independent implementation, diffusers' DiTTransformer2DModel."""

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_timestep_embedding

from benchmarks.peer import diffusers_dit, set_differences
from dit.models.config import DiTConfig
from dit.models.dit import DiT
from dit.models.layers import timestep_sinusoid

DEPTH, HEADS, WIDTH, CLASSES = 3, 4, 64, 10


@pytest.fixture(scope="module")
def ours() -> DiT:
    model = DiT(DiTConfig(input_size=16, width=WIDTH, depth=DEPTH, heads=HEADS, num_classes=CLASSES)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def theirs(ours: DiT, *, corrected: bool) -> DiTTransformer2DModel:
    model = diffusers_dit(ours, norm_eps=1e-6 if corrected else 1e-5).eval()
    return set_differences(model) if corrected else model


@torch.no_grad()
def error(ours: DiT, other: DiTTransformer2DModel, t: int) -> float:
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(t))
    times, labels = torch.full((2,), t), torch.tensor([3, CLASSES])
    expected = ours(x, times, labels)
    found = other(x, timestep=times, class_labels=labels, return_dict=False)[0]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("t", [0, 37, 500, 999])
def test_same_as_diffusers_once_its_two_differences_are_set(ours: DiT, t: int) -> None:
    assert error(ours, theirs(ours, corrected=True), t) < 1e-6


def test_diffusers_as_it_comes_is_off_by_a_known_amount(ours: DiT) -> None:
    stock = theirs(ours, corrected=False)
    early, middle, late = (error(ours, stock, t) for t in (37, 500, 999))
    assert (early, middle, late) == pytest.approx((0.0015, 0.026, 0.027), rel=0.1)


def test_timestep_sinusoid() -> None:
    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    expected = get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_sinusoid(t), expected, rtol=0, atol=1e-4)
    exact = t.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(
        timestep_sinusoid(t).double(), torch.cat([exact.cos(), exact.sin()], 1), rtol=0, atol=1e-4
    )
