"""The Fréchet distance and its peers, Inception's layouts, precision and recall's memory, sampling and diffusers.

The weights are random; speed and memory do not depend on them.
"""

# N = reference images, M = samples, D = features

import multiprocessing
import resource
from functools import partial

import numpy as np
import torch
from scipy import linalg
from torch import Tensor

from benchmarks.common import Measured, Result, fastest, main, seconds
from benchmarks.sampling_speed import SMALL, sampling
from dit.devices import device
from dit.metrics.extractors.inception import DIMS, SIDE, InceptionTF, InceptionV3, fold_norms
from dit.metrics.extractors.resize import resize_tf1
from dit.metrics.frechet import frechet_distance
from dit.metrics.precision_recall import Mode, precision_recall

IMAGES = 16
REFERENCE, SAMPLES = 10_000, 50_000
MODE: Mode = "adm-fp16"
"""The mode that needs more memory."""


def measure() -> Measured:
    """Measure at the sizes of published evaluations, except for sampling."""
    parts = [distances(DIMS), layouts(IMAGES), memory(REFERENCE, SAMPLES, DIMS), sampling(SMALL)]
    return [result for results, _ in parts for result in results], {
        k: v for _, found in parts for k, v in found.items()
    }


def distances(dims: int) -> Measured:
    """Our Fréchet distance against two ways to find the root of the product of the covariances.

    ``scipy.linalg.sqrtm`` is what clean-fid and the original code use, ``numpy.linalg.eigvals`` what torch-fidelity
    0.4 does. Both packages need torchvision, so their formulas stand here.

    Raises:
        ValueError: they differ.
    """
    rng = np.random.default_rng(0)
    mean = np.zeros(dims)
    s1, s2 = (np.cov(rng.normal(size=(2 * dims, dims)) * scale, rowvar=False) for scale in (1, 1.5))
    found: dict[str, float] = {}

    def ours() -> None:
        tensors = [torch.from_numpy(value) for value in (mean, s1, mean, s2)]
        found["ours"] = frechet_distance(tensors[0], tensors[1], tensors[2], tensors[3])

    def sqrtm() -> None:
        found["sqrtm"] = float(np.trace(s1 + s2) - 2 * np.trace(linalg.sqrtm(s1 @ s2)).real)

    def eigvals() -> None:
        roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex))
        found["eigvals"] = float(np.trace(s1 + s2) - 2 * roots.real.sum())

    times = {"fd": fastest(ours, times=3), "fd_sqrtm": seconds(sqrtm), "fd_eigvals": seconds(eigvals)}
    if any(abs(found["ours"] / value - 1) > 1e-6 for value in found.values()):
        raise ValueError(f"distances disagree: {found}")
    results = [Result(name, value, "s") for name, value in times.items()]
    return results, {f"fd_vs_{name}": times[f"fd_{name}"] / times["fd"] for name in ("sqrtm", "eigvals")}


def layouts(count: int) -> Measured:
    """Inception's features with folded norms in channels-last layout, against the unchanged network."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), np.uint8))
    network = InceptionV3().eval().to(device())

    def plainly() -> None:
        with torch.no_grad():
            network((resize_tf1(images.to(device()).permute(0, 3, 1, 2).float(), SIDE) - 128) / 128)

    plain = fastest(plainly, times=3)
    fold_norms(network)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = fastest(partial(InceptionTF(network, "").outputs, images), times=3)
    results = [Result("features", count / ours, "images/s"), Result("features_plain", count / plain, "images/s")]
    return results, {"features_vs_plain": plain / ours}


def memory(reference: int, samples: int, dims: int) -> Measured:
    """Peak memory of a process that computes precision and recall, including features and libraries."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        took, peak = pool.apply(_precision_recall, (reference, samples, dims))
    return [Result("precision_recall", took, "s"), Result("precision_recall_peak", peak / 2**30, "GiB")], {}


def _precision_recall(reference: int, samples: int, dims: int) -> tuple[float, int]:
    generator = torch.Generator().manual_seed(0)
    sets: list[Tensor] = [torch.randn(count, dims, generator=generator) for count in (reference, samples)]
    took = seconds(lambda: precision_recall(sets[0].to(device()), sets[1].to(device()), MODE))
    if torch.cuda.is_available():
        return took, torch.cuda.max_memory_allocated()
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(measure, __doc__)
