"""Files of ADM's suite, whole and hostile."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dit.metrics.npz import Npz
from storage import uri
from storage.errors import InputError


def images(count: int = 5, side: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_streamed(tmp_path: Path, save: object) -> None:
    save(tmp_path / "a.npz", images(), np.arange(5))  # type: ignore[operator]
    found = Npz(str(tmp_path / "a.npz")).images()
    assert (found.count, found.side, found.crop) == (5, 4, "none")
    assert found.digest == uri.sha256((tmp_path / "a.npz").read_bytes())
    parts = list(found.batches(2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert np.array_equal(np.concatenate(parts), images())


def test_statistics(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(50, 6))
    mean, covariance = x.mean(0), np.cov(x.T).astype(np.float32)
    np.savez(tmp_path / "a.npz", mu=mean, sigma=np.asfortranarray(covariance))
    file = Npz(str(tmp_path / "a.npz"))
    assert (file.has_images, file.has_statistics) == (False, True)
    found = file.statistics("features")
    assert found is not None
    assert np.array_equal(found.mean.numpy(), mean)
    assert np.array_equal(found.covariance.numpy(), covariance.astype(np.float64))
    assert file.statistics("spatial") is None
    with pytest.raises(InputError, match="has no images \\(arr_0\\), only mu, sigma"):
        file.images()


def npz(**members: bytes) -> bytes:
    with io.BytesIO() as data:
        with zipfile.ZipFile(data, "w") as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
        return data.getvalue()


def npy(array: np.ndarray, cut: int = 0) -> bytes:
    with io.BytesIO() as data:
        np.lib.format.write_array(data, array)
        return data.getvalue()[: -cut or None]


class Loud:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code of a stranger was run')",))


PICKLED = npy(np.zeros(2, np.uint8)).replace(b"'|u1'", b"'|O' ")[:-2] + pickle.dumps(Loud())


def with_shape(shape: str) -> bytes:
    return npy(images()).replace(b"(5, 4, 4, 3)", shape.encode()[:12].ljust(12))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"these are words", "not a complete npz file"),
        (npz(arr_0=npy(images()))[:-30], "not a complete npz file"),
        (npz(other=npy(images())), "has neither images"),
        (npz(mu=npy(np.zeros(3))), "has neither images"),
        (npz(arr_0=PICKLED), "arr_0 is object"),
        (npz(arr_0=b"\x93NUMPY\x09\x00rest"), r"arr_0 has npy format \(9, 0\)"),
        (npz(arr_0=b"no magic here"), "not a complete npz file"),
        (npz(arr_0=npy(images().astype(np.float32))), "arr_0 is float32"),
        (npz(arr_0=npy(images()[:, :2])), r"arr_0 is uint8 \(5, 2, 4, 3\)"),
        (npz(arr_0=npy(images()[:0])), r"arr_0 is uint8 \(0, 4, 4, 3\)"),
        (npz(arr_0=npy(np.asfortranarray(images()))), "arr_0 is uint8"),
        (npz(arr_0=npy(np.zeros((1, 1025, 1025, 3), np.uint8))), "of at most 1024 px"),
        (npz(arr_0=npy(images(), cut=1)), "truncated file"),
        (npz(arr_0=with_shape("(9**9,4,4,3)")), "not a complete npz file"),
    ],
)
def test_what_is_no_such_file_is_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said) as caught:
        list(Npz(str(path)).images().batches(2))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (np.zeros(3), np.zeros((2, 2)), "not a mean and a covariance"),
        (np.zeros((3, 3)), np.zeros((3, 3)), "not a mean and a covariance"),
        (np.full(2, np.nan), np.eye(2), "mu is not finite"),
        (np.zeros(3, np.int64), np.eye(3), "mu is int64"),
        (np.zeros(9000, np.float16), np.eye(3), "at most 8192 features"),
    ],
)
def test_statistics_of_no_use(tmp_path: Path, mean: np.ndarray, covariance: np.ndarray, said: str) -> None:
    np.savez(tmp_path / "a.npz", mu=mean, sigma=covariance)
    with pytest.raises(InputError, match=said):
        Npz(str(tmp_path / "a.npz")).statistics("features")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Npz(str(tmp_path / "none.npz"))
