"""What outputs cost, over ranks, attempts and kills."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from outputs import made, planned

from storage import cost, uri
from storage.cost import FOLDER, Cost, metered, parts, spent
from storage.manifest import Manifest
from storage.patience import patient
from storage.processors import Processors
from storage.verify import faults, uncommitted


class Meter:
    """A gauge with the numbers that a test gives it."""

    device = "meter"

    def __init__(self, memory: int = 100, joules: float = 2.5, unread: str = "") -> None:
        self.memory, self.energy, self.unread = memory, joules, unread

    def peak_memory(self) -> int:
        return self.memory

    def joules(self) -> float:
        return self.energy


def cost_of(made: Manifest) -> Cost:
    assert made.cost is not None
    return made.cost


def test_all_ranks_count(tmp_path: Path) -> None:
    out = planned(str(tmp_path), "train")
    with metered(out.uri, Meter(100), 0), metered(out.uri, Meter(300, 4.0), 1):
        found = cost_of(made(out))
    assert (found.attempts, found.peak_memory, found.energy_joules, found.devices) == (1, 300, 6.5, ("meter",))
    assert found.device_seconds > 0
    assert Manifest.read(out.uri).cost == found


def test_the_energy_of_all_is_known_or_none(tmp_path: Path) -> None:
    out = planned(str(tmp_path), "train")
    with metered(out.uri, Meter(), 0), metered(out.uri, Meter(unread="no meter"), 1):
        found = cost_of(made(out))
    assert (found.energy_joules, found.energy_unread) == (None, "no meter")


KILLED = """
import sys, time
sys.path[:0] = sys.argv[2:]
from test_device_seconds import Meter
from storage import cost
cost.EVERY_SECONDS = 0.05
meter = Meter(700, 0.0)
with cost.metered(sys.argv[1], meter):
    print("begun", flush=True)
    while True:
        meter.energy += 1.0
        time.sleep(0.01)
"""


def test_what_a_killed_attempt_has_noted_counts(tmp_path: Path) -> None:
    out, here = planned(str(tmp_path), "train"), Path(__file__)
    paths = [str(here.parents[2]), str(here.parent)]
    with subprocess.Popen([sys.executable, "-c", KILLED, out.uri, *paths], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while not any((part.energy_joules or 0) > 10 for part in parts(out.uri)):
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    (killed,) = parts(out.uri)
    with metered(out.uri, Meter(100)):
        found = cost_of(made(out))
    assert (found.attempts, found.peak_memory) == (2, 700)
    assert found.energy_joules == (killed.energy_joules or 0) + 2.5
    assert found.device_seconds > killed.device_seconds > 0


def test_a_failed_attempt_counts_to_its_end(tmp_path: Path) -> None:
    out, gauge = planned(str(tmp_path), "train"), Meter(joules=1.0)
    with pytest.raises(RuntimeError), metered(out.uri, gauge):
        gauge.energy = 9.0
        raise RuntimeError
    found = spent(out.uri)
    assert found is not None and found.energy_joules == 9.0


def test_a_cost_changes_neither_content_nor_soundness(tmp_path: Path) -> None:
    free, costly = (planned(str(tmp_path / name), "train") for name in ("free", "costly"))
    found = [free.commit(Manifest, [free.put("a", b"same")])]
    with metered(costly.uri, Meter()):
        found.append(costly.commit(Manifest, [costly.put("a", b"same")]))
    assert [each.cost is None for each in found] == [True, False]
    assert found[0].content == found[1].content and found[0].digest == found[1].digest
    assert uncommitted(found[1]) == [] and faults(found[1], full=True) == []


def test_a_milestone_has_no_cost_of_its_own(tmp_path: Path) -> None:
    out, milestone = planned(str(tmp_path), "train", 1), planned(str(tmp_path), "train", 2)
    with metered(out.uri, Meter()):
        assert made(milestone).cost is None
        assert made(out).cost is not None


def test_a_damaged_record_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = planned(str(tmp_path), "train")
    uri.write(out.url(FOLDER, "0.json"), b"{}")
    with metered(out.uri, Meter()):
        assert cost_of(made(out)).attempts == 1
    assert "0.json is not counted" in caplog.text


def test_a_store_that_is_away_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    with patient(600), metered(str(tmp_path / "file" / "out"), Meter()):
        cost.note()
    assert caplog.text.count("is not written") == 1


def rapl(folder: Path, **packages: int) -> Path:
    for number, (name, microjoules) in enumerate(packages.items()):
        zone = folder / f"intel-rapl:{number}"
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text(f"{name.replace('_', '-')}\n")
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text("1000000000\n")
    (folder / "intel-rapl:0:0").mkdir(exist_ok=True)  # a part of a package
    return folder


def test_the_energy_of_all_packages_is_followed_round_the_end_of_the_counter(tmp_path: Path) -> None:
    gauge = Processors(powercap=rapl(tmp_path, package_0=999_000_000, package_1=5_000_000, psys=1))
    rapl(tmp_path, package_0=1_000_000, package_1=6_500_000, psys=900)
    assert gauge.unread == "" and gauge.joules() == pytest.approx(2.0 + 1.5)
    rapl(tmp_path, package_0=3_000_000, package_1=6_500_000, psys=900)
    assert gauge.joules() == pytest.approx(5.5)


def test_ranks_of_one_machine_count_its_processors_once(tmp_path: Path) -> None:
    folder = rapl(tmp_path, package_0=0)
    gauges = [Processors(first=first, powercap=folder) for first in (True, False)]
    rapl(tmp_path, package_0=7_000_000)
    assert [(gauge.unread, gauge.joules()) for gauge in gauges] == [("", 7.0), ("", 0.0)]


def test_energy_that_cannot_be_read_is_said_and_not_invented(tmp_path: Path) -> None:
    gauge = Processors(powercap=tmp_path / "nothing")
    assert gauge.unread == f"no energy counters of processors in {tmp_path / 'nothing'}"
    folder = rapl(tmp_path, package_0=0)
    (folder / "intel-rapl:0" / "energy_uj").unlink()
    (folder / "intel-rapl:0" / "energy_uj").mkdir()  # as root may read every file
    assert Processors(powercap=folder).unread.startswith("the processors' energy counters cannot be read (Is a dir")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak since a moment")
def test_peak_memory_is_that_since_the_beginning() -> None:
    big = bytearray(os.urandom(1)) * 300_000_000
    first = Processors().peak_memory()
    del big
    assert first >= 300_000_000
    assert Processors().peak_memory() < first - 200_000_000
