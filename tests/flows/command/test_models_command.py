"""The command that lists the models."""

import json
import subprocess
import sys
from collections.abc import Iterator

import published_costs
import pytest

from dit.models import cost as costs
from dit.models.config import SIZES, ModelConfig, dit_config
from flows.command import models
from flows.command.main import main


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the smallest models: the others are counted in the tests of the models."""
    monkeypatch.setattr(costs, "SIZES", {"S": SIZES["S"]})
    monkeypatch.setattr(costs, "IMAGE_SIZES", {"digits16": {}})


def published(latent: int) -> dict[str, tuple[float | None, float, float]]:
    """By name: million parameters, GMAC and what may lie between them and ours; DiT's at 512 pixels have GMAC alone."""
    found: dict[str, tuple[float | None, float, float]] = {}
    for name, (params, gmac, gmac_512) in published_costs.DIT.items():
        found[f"DiT-{name} adaln_zero"] = (params, gmac, 5e-3) if latent == 32 else (None, gmac_512, 5e-3)
    if latent == 32:
        found |= {f"DiT-XL/2 {block}": (*row, 1e-3) for block, row in published_costs.BLOCKS.items()}
        found |= {f"SiT-{name}": (*row, 5e-3) for name, row in published_costs.SIT.items()}
        found["LightningDiT-XL/1"] = (published_costs.LIGHTNING_XL1, 118.6, 1e-3)
        found |= {f"DiffiT {name}": (*row, 5e-3) for name, row in published_costs.DIFFIT_IMAGE.items()}
    return found | {
        f"DiffiT-{name}": (*row, 1e-3) for (name, side), row in published_costs.DIFFIT.items() if side == latent
    }


@pytest.mark.parametrize("latent", [32, pytest.param(64, marks=pytest.mark.full)])
def test_every_published_size(latent: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    expected, every = published(latent), costs.catalogue

    def those(side: int) -> Iterator[tuple[str, ModelConfig]]:
        return (model for model in every(side) if model[0] in expected)

    monkeypatch.setattr(costs, "catalogue", those)
    assert main(["models", "--latent", str(latent), "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert rows.keys() == expected.keys()
    for name, (params, gmac, apart) in expected.items():
        assert rows[name]["gmac"] == pytest.approx(gmac, rel=apart, abs=published_costs.rounding(gmac)), name
        assert params is None or rows[name]["params_m"] == pytest.approx(params, rel=1e-3), name
        assert rows[name]["params_counted"] == ("trained" if name.startswith("DiffiT") else "all")


def test_table(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    header, *lines, note, of_sit, of_lightning = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["model", "params", "M"]
    assert len(lines) == 4 * 3 + 1 + 1 + 3 + 1
    assert of_sit.startswith("SiT: as it is trained here, without")
    assert of_lightning.startswith("LightningDiT: for the same images")
    assert len({len(line) for line in (header, *lines)}) == 1
    assert note.startswith("params M: with DiT's fixed position table and without DiffiT's")
    assert next(line.split() for line in lines if line.startswith("DiffiT-S/2"))[1] == "27.32"
    row = next(line.split() for line in lines if line.startswith("DiT-S/2 adaln_zero"))
    assert row[2:] == ["32.96", "6.06", "36.3", "0.12", "0.12", "0.24", "0.12"]  # 32.86 M trained: 0.2448 GiB of AdamW


def test_json(few: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--latent", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["latent"] == 64
    row = next(row for row in found["models"] if row["model"] == "DiT-S/2 adaln_zero")
    assert row["config"] == dit_config("S/2", input_size=64).model_dump()
    assert row["gmac"] == pytest.approx(31.44, rel=5e-3)
    assert row["params_m"] == pytest.approx(33.25, rel=1e-3)
    assert row["training_flops"] == pytest.approx(6e9 * row["gmac"])
    assert row["memory_bytes"]["weights"] == pytest.approx(4e6 * row["params_m"])


def test_wrong_latent(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--json"]):
        assert main(["models", "--latent", "12", *more]) == 2
        captured = capsys.readouterr()
        assert captured.err == "error: latent: 12 is not a multiple of 8, the largest patch size\n"
        assert not captured.out


def test_starts_no_prefect() -> None:
    code = (
        "import sys; from flows.command import main, models; models.table = lambda latent: [latent]; "
        "assert main.main(['models']) == 0; assert not {'prefect', 'mlflow'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "32\n"), done.stderr
    assert callable(models.table)
