from dit.models.build import build
from dit.models.config import DiffiTImageConfig, DiTConfig
from dit.models.diffit_image import ResBlock
from dit.training.blocks import blocks


def test_blocks_of_every_model() -> None:
    dit = build(DiTConfig(input_size=8, width=32, depth=3, heads=2, num_classes=4))
    assert blocks(dit) == list(dit.blocks)
    image = build(DiffiTImageConfig(stem_width=32, widths=(32, 32), depths=(2, 1), window=4, time_width=32))
    assert [type(block) for block in blocks(image)] == [ResBlock] * 5
