import time

import pytest
import torch
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from dit.models.config import DiTConfig, diffit_image_config
from dit.models.cost import cost
from dit.training import throughput
from dit.training.throughput import ThroughputMeter, matmul_speed

MODEL = DiTConfig(input_size=8, width=32, depth=1, heads=2, num_classes=4)
CPU = torch.device("cpu")


def test_rates_are_those_of_the_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter = ThroughputMeter(MODEL, 16, 2, CPU, torch.float32)
    meter.begin(30)
    first, second = meter.measure(40, 1.0), meter.measure(50, 1.5)
    assert (first["images_per_second"], second["images_per_second"]) == (40, 80)
    assert (first["data_wait_share"], second["data_wait_share"]) == (0.25, 0.25)
    assert first["tokens_per_second"] == 40 * 16
    assert first["tflops"] == pytest.approx(40 * cost(MODEL).training_flops / 1e12)
    assert 0.01 < first["memory_gib"] < 1000
    assert "mfu" not in first


def test_mfu_is_of_what_all_devices_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "matmul_speed", lambda dtype, device: 5e9)
    monkeypatch.setattr(throughput, "memory", lambda device: 2**31)
    monkeypatch.setattr(throughput, "system", lambda device: {})
    meter = ThroughputMeter(MODEL, 16, 2, torch.device("cuda"), torch.bfloat16)
    meter.begin(0)
    values = meter.measure(10, 0.0)
    assert values["mfu"] == pytest.approx(values["tflops"] * 1e12 / 1e10)
    assert values["memory_gib"] == 2


def test_the_machine_is_watched_under_mlflows_names() -> None:
    meter = ThroughputMeter(MODEL, 16, 1, CPU, torch.float32)
    meter.begin(0)
    values = {name: value for name, value in meter.measure(1, 0.0).items() if name.startswith("system/")}
    known = {"system/" + name for monitor in (CPUMonitor(), NetworkMonitor()) for name in _names(monitor)}
    assert values.keys() <= known
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    assert 0 < values["system/system_memory_usage_percentage"] <= 100


def _names(monitor: BaseMetricsMonitor) -> list[str]:
    monitor.collect_metrics()
    return list(monitor.metrics)


def test_pixels_are_no_tokens() -> None:
    meter = ThroughputMeter(diffit_image_config("digits16"), 16, 1, CPU, torch.float32)
    meter.begin(0)
    assert "tokens_per_second" not in meter.measure(1, 0.0)


def test_a_matrix_product_is_as_fast_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 25.0, 30.0, 33.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert matmul_speed(torch.float32, CPU) == 2 * 2048**3 / 2
