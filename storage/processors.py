"""Memory and energy of a process and its machine, as Linux tells them."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Processors:
    """A `storage.cost.Gauge` of a rank without a GPU.

    Its energy is that of the machine's processors, which all ranks there share: the first one reads it for all.

    Args:
        first: whether the rank is the first on its machine.
        powercap: folder of the kernel's energy counters (RAPL).
    """

    device = "processors"

    def __init__(self, *, first: bool = True, powercap: Path = POWERCAP) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak of what this process did before is not ours
        self._packages: dict[Path, int] = {}
        self._joules, self.unread = 0.0, ""
        if first:
            self._open(powercap)

    def peak_memory(self) -> int:
        """Most bytes of this process in memory."""
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def joules(self) -> float:
        """Energy of all processor packages. Counters that have wrapped round once since the last call are followed."""
        for package, before in self._packages.items():
            self._packages[package] = now = _number(package / "energy_uj")
            wrapped = _number(package / "max_energy_range_uj") if now < before else 0
            self._joules += (now - before + wrapped) / 1e6
        return self._joules

    def _open(self, powercap: Path) -> None:
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        try:
            packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
            self._packages = {package: _number(package / "energy_uj") for package in packages}
        except OSError as error:
            self.unread = f"the processors' energy counters cannot be read ({error.strerror}: {error.filename})"
        else:
            self.unread = "" if packages else f"no energy counters of processors in {powercap}"


def _number(path: Path) -> int:
    return int(path.read_text())
