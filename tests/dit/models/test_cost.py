"""Counts against counts by hand, and the list of what there is."""

from typing import get_args

import pytest
import torch

from dit.models.build import build
from dit.models.config import (
    SIZES,
    BlockKind,
    DiTConfig,
    ModelConfig,
    diffit_config,
    diffit_image_config,
    dit_config,
    lightning_config,
    sit_config,
)
from dit.models.cost import activations, catalogue, cost
from storage.errors import InputError


def test_counts_of_a_tiny_model_by_hand() -> None:
    d, n, out = 8, 4, 2 * 2 * 8
    found = cost(DiTConfig(input_size=4, width=d, depth=1, heads=2, num_classes=3))
    linears = {"patch": 16 * d, "block": 12 * d * d, "head": d * out}  # on each token
    once = 256 * d + d * d + 6 * d * d + 2 * d * d  # time, modulations
    attention = 2 * n * n * d
    assert found.macs == n * sum(linears.values()) + once + attention
    biases = d + (3 + 1 + 4 + 1) * d + out + 2 * d + 6 * d + 2 * d
    assert found.trained == sum(linears.values()) + once + biases + 4 * d  # four labels with the null label
    assert found.parameters == found.trained + n * d
    assert found.training_flops == 6 * found.macs
    weights, gradients = 4 * found.parameters, 4 * found.trained
    assert found.memory == {"weights": weights, "gradients": gradients, "adamw": 2 * gradients, "ema": gradients}


def test_labels_of_a_model_on_images_are_counted() -> None:
    plain = cost(diffit_image_config("digits16"))
    assert cost(diffit_image_config("digits16", num_classes=10)).parameters == plain.parameters + 11 * 128


@pytest.mark.parametrize(
    "config",
    [
        *(dit_config("S/2", input_size=16, block=block) for block in get_args(BlockKind)),
        lightning_config("S/2", qk_norm=True),
        diffit_config("S/2", input_size=16),
        diffit_config("S/2", input_size=16, depth=2),
    ],
)
def test_what_follows_from_two_depths_is_what_is_counted(config: ModelConfig) -> None:
    assert cost(config) == cost(config, lambda model: None)


def test_sit_is_dit_without_the_outputs_of_a_learned_variance() -> None:
    dit, sit = dit_config("S/2"), sit_config("S/2")
    assert (dit.out_channels, sit.out_channels) == (8, 4)
    assert cost(dit).parameters - cost(sit).parameters == 2 * 2 * 4 * (sit.width + 1)
    assert sit_config("S/2", learn_variance=True) == dit  # as it is published


def test_catalogue_has_every_model_once_and_the_latent_is_theirs() -> None:
    models = dict(catalogue(64))
    assert len(models) == len(list(catalogue(32))) == 4 * 12 + 4 + 12 + 4 + 3
    assert {
        "DiT-XL/2 adaln_zero",
        "DiT-S/8 in_context",
        "DiffiT-B/4",
        "DiffiT cifar10",
        "LightningDiT-XL/1",
        "SiT-XL/2",
    } <= models.keys()
    assert {c.input_size for name, c in models.items() if "/" in name} == {64, 32}
    assert {name for name, c in models.items() if c.input_size == 32} >= {f"LightningDiT-{size}/1" for size in SIZES}
    assert len({config.model_dump_json() for config in models.values()}) == len(models)


@pytest.mark.parametrize("latent", [0, -8, 12])
def test_latent_that_does_not_divide(latent: int) -> None:
    with pytest.raises(InputError, match=f"latent: {latent} is not a multiple of 8"):
        list(catalogue(latent))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        dit_config("S/8", input_size=16, num_classes=3),
        lightning_config("S/4", qk_norm=True),
        diffit_image_config("digits16"),
        diffit_image_config("digits16", condition="mlp"),
        diffit_image_config("digits16", condition="token"),
    ],
)
def test_activations_are_what_a_real_forward_pass_keeps(config: ModelConfig, autocast: torch.dtype | None) -> None:
    model, kept = build(config), list[torch.Tensor]()
    y = torch.zeros(3, dtype=torch.long) if config.num_classes else None
    lower = torch.autocast("cpu", autocast, enabled=autocast is not None)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x), lower:
        model(torch.randn(3, config.in_channels, 16, 16), torch.ones(3), y)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    found = sum(size for where, size in storages.items() if where not in own)
    assert activations(config, 3, autocast) == pytest.approx(found, rel=2e-4)  # kernels keep a few numbers of their own
