"""DiffiT on pixels."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from dit.models.build import AnyModelConfig, build
from dit.models.config import DiffiTImageConfig, ModelConfig, diffit_image_config
from dit.models.cost import cost
from dit.models.diffit_image import AUGMENT_NUMBERS, ImageDiffiT, ResBlock, from_windows, to_windows
from dit.models.layers import timestep_sinusoid
from storage.errors import InputError

# Million parameters; billion multiply-accumulates
COSTS = [
    ("ffhq64", {}, 46.4, 33.8),
    ("ffhq64", {"depths": (1, 2, 2, 2)}, 25.4, 17.5),
    ("cifar10", {}, 29.8, 7.7),
    ("cifar10", {"depths": (2, 2, 2)}, 17.0, 4.7),
    ("cifar10", {"widths": (256, 256, 256)}, 40.8, 17.3),
]
TINY = {"input_size": 16, "stem_width": 8, "widths": (32, 64), "depths": (1, 2), "window": 4, "time_width": 16}


def tiny(**fields: object) -> ImageDiffiT:
    torch.manual_seed(0)
    model = build(DiffiTImageConfig.model_validate(TINY | fields))
    assert isinstance(model, ImageDiffiT)
    return model.eval()


def randomised(**fields: object) -> ImageDiffiT:
    model = tiny(**fields)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(side: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(2)), torch.tensor([-1.5, 0.0, 1.1])


@pytest.mark.parametrize(("name", "fields", "params", "gmac"), COSTS)
def test_size_and_cost(name: str, fields: dict[str, object], params: float, gmac: float) -> None:
    found = cost(diffit_image_config(name, **fields))
    assert round(found.parameters / 1e6, 1) == params
    assert round(found.macs / 1e9, 1) == gmac


def test_concatenations_of_ffhq() -> None:
    with torch.device("meta"):
        model = build(diffit_image_config("ffhq64"))
    assert isinstance(model, ImageDiffiT)
    matches = [stage.match for stage in model.up_stages]
    assert [m.in_channels for m in matches if isinstance(m, torch.nn.Conv2d)] == [384, 512, 512]
    assert [type(m).__name__ for m in (s.match for s in model.down_stages)] == ["Identity", "Conv2d"] + ["Identity"] * 2


def test_windows_are_squares_of_one_image_row_by_row() -> None:
    x = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    found = to_windows(x, 4)
    assert found.shape == (12, 16, 3)
    for index in range(12):
        image, row, column = index // 6, index % 6 // 3, index % 3
        square = x[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert torch.equal(found[index], square.reshape(3, 16).T)
    assert torch.equal(from_windows(found, 4, 8, 12), x)


def test_attention_stays_within_a_window() -> None:
    """With a convolution that only copies, a change in one window shows in that window alone."""
    block = ResBlock(32, DiffiTImageConfig.model_validate(TINY)).eval()
    torch.nn.init.dirac_(block.conv.weight)
    block.norm = torch.nn.Identity()
    for parameter in block.block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, c = torch.randn(1, 32, 8, 8), torch.randn(1, 16)
    moved = x.clone()
    moved[0, :, 5, 2] += 1
    changed = (block(moved, c) - block(x, c)).abs().amax((0, 1)) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[4:, :4] = True
    assert torch.equal(changed, expected)


def test_residual_block_is_its_formula() -> None:
    model = randomised()
    block = model.down_stages[0].blocks[0]
    assert isinstance(block, ResBlock)
    x, c = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    normed = F.group_norm(x, 8, block.norm.weight, block.norm.bias, 1e-6)
    h = F.conv2d(F.silu(normed), block.conv.weight, block.conv.bias, padding=1)
    expected = x.clone()
    for image in range(2):
        for top in (0, 4):
            for left in (0, 4):
                tokens = h[image, :, top : top + 4, left : left + 4].reshape(1, 32, 16).transpose(1, 2)
                out = block.block(tokens, c[image : image + 1])
                expected[image, :, top : top + 4, left : left + 4] += out[0].T.reshape(32, 4, 4)
    torch.testing.assert_close(block(x, c), expected, rtol=1e-5, atol=1e-5)


def test_untrained_model_predicts_zero_and_its_transformer_blocks_are_the_identity() -> None:
    model = tiny()
    assert not model(*batch()).any()
    for stage in (*model.down_stages, *model.up_stages):
        for block in stage.blocks:
            tokens = torch.randn(4, 16, block.conv.in_channels)
            assert torch.equal(block.block(tokens, torch.randn(2, 16)), tokens)


def test_initial_convolutions() -> None:
    model = tiny()
    weight = model.up[0].weight
    assert isinstance(weight, Tensor)
    bound = (6 / (9 * 64 * 2)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_noise_level_reaches_every_place_and_every_parameter_learns() -> None:
    model = randomised()
    x, t = batch()
    out = model(x, t)
    assert ((model(x, t + 0.5) - out).abs() > 0).float().mean() > 0.99
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_labels() -> None:
    model = randomised(num_classes=10)
    x, t = batch()
    assert not torch.allclose(model(x, t, torch.tensor([1, 2, 3])), model(x, t, torch.tensor([10, 10, 10])))
    with pytest.raises(InputError, match="null label is 10"):
        model(x, t)
    with pytest.raises(InputError, match="unconditional"):
        tiny()(x, t, torch.tensor([1, 2, 3]))


def test_dropout_is_for_samples_with_a_key_and_differs_from_block_to_block() -> None:
    model = randomised(dropout=0.5)
    x, t = batch()
    plain = model(x, t)
    assert torch.equal(model.train()(x, t), plain)
    keys = torch.tensor([1, 2, 3])
    dropped = model(x, t, dropout=keys)
    assert torch.equal(model(x, t, dropout=keys), dropped)
    assert not torch.allclose(dropped, plain)
    again = model(x, t, dropout=torch.tensor([1, 5, 3]))
    torch.testing.assert_close(again[0::2], dropped[0::2])
    assert not torch.allclose(again[1], dropped[1])
    sites = [module.site for module in model.modules() if isinstance(module, ResBlock)]
    assert sorted(sites) == list(range(len(sites)))
    assert len(sites) >= 3


def test_any_size_that_divides_into_windows() -> None:
    model = randomised()
    assert model(*batch(24)).shape == (3, 3, 24, 24)
    with pytest.raises(InputError, match="20 x 20 px.*multiples of 8"):
        model(*batch(20))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input_size": 20}, "input_size 20: 2 resolutions with windows of 4 need a multiple of 8"),
        ({"window": 16}, "multiple of 32"),
        ({"widths": (32, 48)}, "not multiples of 32"),
        ({"widths": (32,)}, "differ in length"),
        ({"depths": (0, 1)}, "depths"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_config_refuses_what_does_not_fit(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        DiffiTImageConfig.model_validate(TINY | fields)


def test_config_by_name_and_by_kind() -> None:
    config = diffit_image_config("digits16", num_classes=10)
    assert (config.input_size, config.num_classes) == (16, 10)
    assert TypeAdapter[ModelConfig](AnyModelConfig).validate_python(config.model_dump()) == config
    with pytest.raises(InputError, match="cifar10, ffhq64, digits16"):
        diffit_image_config("ffhq")


def test_compiles_into_one_graph() -> None:
    model = randomised(augmented=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    told = (*batch(), None, torch.ones(3, AUGMENT_NUMBERS))
    torch.testing.assert_close(compiled(*told), model(*told))


def test_runs_in_bfloat16() -> None:
    model = randomised()
    x, t = batch()
    exact = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t)
    low = model.bfloat16()(x.bfloat16(), t)
    for out in (mixed, low):
        assert (out.float() - exact).norm() < 0.05 * exact.norm()


def test_meta_model_can_be_initialised_where_it_lands() -> None:
    with torch.device("meta"):
        model = build(DiffiTImageConfig.model_validate(TINY))
    assert isinstance(model, ImageDiffiT)
    model.to_empty(device="cpu")
    model.init_weights()
    assert not model(*batch()).any()


def test_augmentation_joins_the_noise_level() -> None:
    model, plain = randomised(augmented=True), randomised()
    x, t = batch()
    labels = torch.randn(3, AUGMENT_NUMBERS, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(x, t), model(x, t, None, torch.zeros(3, AUGMENT_NUMBERS)))
    found = model(x, t, None, labels)
    assert ((found - model(x, t)).abs() > 0).float().mean() > 0.99
    token, added = model.t_embedder, model.t_embedder.augment
    assert added is not None
    expected = token.mlp(timestep_sinusoid(t, 64) + labels @ added.weight.T)
    torch.testing.assert_close(token(t, labels, torch.float32), expected)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"t_embedder.augment.weight"}
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with pytest.raises(InputError, match="takes no augmentation labels"):
        plain(x, t, None, labels)


def test_augmentation_starts_xavier_uniform_and_costs_1152_numbers() -> None:
    weight = tiny(augmented=True).get_parameter("t_embedder.augment.weight")
    bound = (6 / (9 + 128)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    told, untold = (cost(diffit_image_config("digits16", augmented=augmented)) for augmented in (True, False))
    assert told.parameters == untold.parameters + 1152
    assert [diffit_image_config(name).augmented for name in ("cifar10", "ffhq64", "digits16")] == [True, True, False]
