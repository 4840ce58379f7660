from collections.abc import Mapping


class Recorder:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}
        self.steps: list[tuple[int, int, str]] = []

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        raise AssertionError("storage has no metrics")

    def artifact(self, name: str, data: bytes) -> None:
        self.artifacts[name] = data

    def progress(self, done: int, total: int, unit: str) -> None:
        self.steps.append((done, total, unit))
