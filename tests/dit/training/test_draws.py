import pytest
import torch

from dit.training.draws import StepDraws

SHAPE = (2, 3, 3)


def tensors(draws: StepDraws) -> dict[str, torch.Tensor]:
    return {
        name: getattr(draws, name) for name in ("t", "noise", "label_drop", "posterior", "flip", "augment", "dropout")
    }


@pytest.mark.parametrize("cuts", [[8, 8], [4, 4, 4, 4], [1, 15]])
def test_ranks_share_one_global_batch(cuts: list[int]) -> None:
    whole = tensors(StepDraws(1, 100, range(16), SHAPE))
    start, parts = 0, []
    for cut in cuts:
        parts.append(tensors(StepDraws(1, 100, range(start, start + cut), SHAPE)))
        start += cut
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_shapes_and_ranges() -> None:
    draws = StepDraws(1, 0, range(500), SHAPE)
    for normal in (draws.noise, draws.posterior):
        assert normal.shape == (500, *SHAPE)
        assert normal.dtype == torch.float32
        assert float(normal.std()) == pytest.approx(1, abs=0.03)
    for uniform in (draws.t, draws.label_drop, draws.flip):
        assert uniform.shape == (500,)
        assert float(uniform.min()) >= 0
        assert float(uniform.max()) < 1
        assert float(uniform.mean()) == pytest.approx(0.5, abs=0.06)


def test_every_draw_differs_from_every_other_and_from_step_to_step() -> None:
    now, later, other = (tensors(StepDraws(seed, step, range(4), SHAPE)) for seed, step in ((1, 5), (1, 6), (2, 5)))
    for name in now:
        assert not torch.equal(now[name], later[name])
        assert not torch.equal(now[name], other[name])
    assert not torch.equal(now["noise"], now["posterior"])
    assert not torch.equal(now["t"], now["label_drop"])
    assert not torch.equal(now["t"], now["flip"])
