"""The installed packages against a lock and against what is needed."""

from importlib.metadata import version

from packaging.requirements import Requirement

from flows.doctor import packages


def test_this_environment_has_what_is_needed() -> None:
    assert packages.check().state in ("ok", "warning")


def test_absent_packages_and_wrong_versions_are_named() -> None:
    needs = [Requirement(text) for text in ("torch>=1", "nosuchpackage>=2", "numpy<1", 'gone; extra == "x"')]
    found = packages.unmet(needs)
    assert found == ["nosuchpackage is missing (needs >=2)", f"numpy {version('numpy')} (needs <1)"]


def test_packages_of_training_are_named_first_and_absent_ones_not() -> None:
    pillow, torch = version("pillow"), version("torch")
    lock = f"anyio=={version('anyio')}\npillow==1.0\nnosuchpackage==1\ntorch==1.0\nnumpy=={version('numpy')}+cpu\n"
    count, others = packages.compared(lock)
    assert count == 4
    assert others == [f"torch {torch} (1.0 in the lock)", f"pillow {pillow} (1.0 in the lock)"]
