"""Any network as extractor: small ONNX files made here, and Inception against its own network in torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from benchmarks.replication.classifier import exported
from dit import evaluate
from dit.evaluate import Classifier, EvaluateConfig, MetricsManifest
from dit.metrics.comparison import differing
from dit.metrics.extractors.inception import InceptionTF, InceptionV3, fold_norms
from dit.metrics.extractors.load import ExtractorRef, load_extractor, weights_sha256
from dit.metrics.reference import ReferenceManifest
from dit.sample import SampleManifest
from storage import uri
from storage.errors import InputError
from storage.estimate import PlanContext
from storage.latents import LatentManifest
from storage.manifest import StageOutput, stage_output
from storage.rows.store import RowReader
from storage.shards.shard import ShardManifest

SIDE, CLASSES = 8, 3
MEAN, DEVIATION = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
SETTINGS: dict[str, Any] = {"name": "small", "side": SIDE, "mean": MEAN, "deviation": DEVIATION}
MATRIX = np.random.default_rng(1).normal(size=(3, CLASSES)).astype(np.float32)


def small(batch: int | str = "batch", layout: tuple[int | str, ...] = (3, SIDE, SIDE)) -> onnx.ModelProto:
    """Features: the mean of each colour; logits: their products with `MATRIX`; spatial: the means of the quarters."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "matrix"], ["logits"]),
        helper.make_node("AveragePool", ["images"], ["quarters"], kernel_shape=[4, 4], strides=[4, 4]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *layout])
    names = {"features": [batch, 3], "logits": [batch, CLASSES], "quarters": [batch, 3, 2, 2]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items()]
    graph = helper.make_graph(nodes, "small", [images], outputs, [numpy_helper.from_array(MATRIX, "matrix")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ref(folder: Path, model: onnx.ModelProto | bytes | None = None, **settings: Any) -> ExtractorRef:
    """A reference to the model, which is written to the folder."""
    model = small() if model is None else model
    data = model if isinstance(model, bytes) else model.SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    return ExtractorRef.model_validate({"name": "onnx", "weights": str(folder), "onnx": SETTINGS | settings})


def pictures(count: int = 5, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def normalised(images: np.ndarray) -> np.ndarray:
    return (images / 255 - MEAN) / DEVIATION


def test_outputs_are_those_that_the_config_names(tmp_path: Path) -> None:
    reference = ref(tmp_path, logits="logits", spatial="quarters", class_names=["cat", "dog", "fox"])
    extractor = load_extractor(reference)
    outputs, x = extractor.outputs(pictures()), normalised(pictures())
    assert outputs.features.dtype == torch.float32
    np.testing.assert_allclose(outputs.features, x.mean((1, 2)), rtol=1e-5)
    assert outputs.logits is not None
    assert outputs.spatial is not None
    np.testing.assert_allclose(outputs.logits, x.mean((1, 2)) @ MATRIX, rtol=1e-5, atol=1e-6)
    quarters = x.reshape(5, 2, 4, 2, 4, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(outputs.spatial, quarters.reshape(5, 12), rtol=1e-4)
    assert isinstance(extractor, Classifier)
    assert extractor.class_names == ("cat", "dog", "fox")
    assert extractor.classify(pictures()).tolist() == outputs.logits.argmax(1).tolist()
    assert (extractor.name, extractor.dims, extractor.published) == ("small", 3, False)
    assert extractor.sha256 == weights_sha256(reference) == uri.sha256((tmp_path / "model.onnx").read_bytes())


def test_without_names_of_classes_it_is_no_classifier(tmp_path: Path) -> None:
    extractor = load_extractor(ref(tmp_path))
    assert not isinstance(extractor, Classifier)
    outputs = extractor.outputs(pictures())
    assert outputs.logits is None
    assert outputs.spatial is None


@pytest.mark.parametrize(
    ("resize", "resized"),
    [
        (
            "pillow-bicubic",
            lambda image: np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)),
        ),
        ("tf1-bilinear", lambda image: image[::2, ::2]),
    ],
)
def test_other_sides_are_resized_as_the_config_says(
    tmp_path: Path, resize: str, resized: Callable[[np.ndarray], np.ndarray]
) -> None:
    images = pictures(side=2 * SIDE)
    expected = normalised(np.stack([resized(image) for image in images])).mean((1, 2))
    found = load_extractor(ref(tmp_path, resize=resize))(images)
    np.testing.assert_allclose(found, expected, atol=4e-4)  # a few pixels may be a level apart from Pillow's


@pytest.mark.parametrize("batch", ["batch", 3])
def test_bits_depend_neither_on_the_batch_nor_on_the_threads(tmp_path: Path, batch: int | str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 7))
    data = exported(Outputs3(network), SIDE, None if batch == "batch" else int(batch))
    extractor, images = load_extractor(ref(tmp_path, data)), pictures(40)
    together = extractor(images)
    assert together.shape == (40, 7)
    alone = torch.cat([extractor(images[i : i + 1]) for i in range(40)])
    assert torch.equal(together, alone)
    torch.set_num_threads(3)
    try:
        assert torch.equal(together, extractor(images))
    finally:
        torch.set_num_threads(1)


class Outputs3(nn.Module):
    """A network whose outputs are features, logits and spatial features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.network(images)
        if isinstance(outputs, Tensor):
            return outputs, outputs[:, :2], outputs[:, :3]
        return outputs.features, outputs.logits, outputs.spatial


def test_inception_is_the_network_in_torch(tmp_path: Path) -> None:
    """The same random weights, by onnxruntime and by torch, for images of another side."""
    torch.manual_seed(0)
    network = InceptionV3().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    fold_norms(network.eval())
    settings = {"side": 299, "resize": "tf1-bilinear", "mean": [128 / 255] * 3, "deviation": [128 / 255] * 3}
    reference = ref(tmp_path, exported(Outputs3(network), 299, 2), **settings, logits="logits", spatial="spatial")
    extractor, images = load_extractor(reference), pictures(2, 32)
    found, expected = extractor.outputs(images), InceptionTF(network, "").outputs(images)
    for name in ("features", "logits", "spatial"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.shape == other.shape
        assert other.std() > 0.01
        assert (one - other).norm() / other.norm() < 1e-5
    assert extractor.dims == 2048


def changed(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = small()
    change(model)
    return model


def outside(tensor: TensorProto) -> None:
    """Have the tensor's numbers in another file."""
    onnx.external_data_helper.set_external_data(tensor, location="../../secret")
    tensor.ClearField("raw_data")


def outside_in_a_node(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(MATRIX, "matrix")
    outside(tensor)
    del model.graph.initializer[:]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["matrix"], value=tensor))


def of_another_kind(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def custom(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("our.ops", 1))
    model.graph.node[2].domain = "our.ops"


def summed_over_images(model: onnx.ModelProto) -> None:
    model.graph.node[1].CopyFrom(helper.make_node("ReduceMean", ["pooled"], ["features"], axes=[0, 2], keepdims=0))
    del model.graph.node[2], model.graph.output[1:]


BAD: dict[str, tuple[onnx.ModelProto | bytes, dict[str, Any], str]] = {
    "text": (b"not a network", {}, r"not an ONNX file that onnxruntime can run \("),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", {}, "Git LFS"),
    "empty": (b"", {}, "is empty; fetch it again"),
    "damaged": (small().SerializeToString()[:-40], {}, "not an ONNX file that onnxruntime can run"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), {}, "not an ONNX file that onnxruntime can run"),
    "outside": (
        changed(lambda model: outside(model.graph.initializer[0])),
        {},
        "has weights in other files; save it as",
    ),
    "node": (changed(outside_in_a_node), {}, "has weights in other files; save it as"),
    "custom": (changed(custom), {}, "our.ops.*is not a registered function/op"),
    "output": (small(), {"features": "pool"}, "has no output 'pool'; it has 'features', 'logits', 'quarters'"),
    "logits": (small(), {"logits": "classes"}, "has no output 'classes'"),
    "side": (small(), {"side": 9}, r"takes \['batch', 3, 8, 8\], not \(B, 3, 9, 9\)"),
    "channels last": (small(layout=("height", "width", 3)), {}, "channels last; put a Transpose in front"),
    "grey": (small(layout=(1, SIDE, SIDE)), {}, r"takes \['batch', 1, 8, 8\], not \(B, 3, 8, 8\)"),
    "flat": (small(layout=(192,)), {}, "not an ONNX file that onnxruntime can run"),
    "bytes": (changed(of_another_kind), {}, "not an ONNX file that onnxruntime can run"),
    "many": (small(100_000), {}, "takes 100,000 images at once"),
    "mixed": (changed(summed_over_images), {}, r"output 'features' is float32 \(3, 1\), not float32 \(8, ...\)"),
    "names": (small(), {"logits": "logits", "class_names": ["cat"]}, "has 3 logits, but onnx.class_names has 1 names"),
    "large": (small(layout=(3, 256, 256)), {"side": 256, "spatial": "quarters"}, "has 12,288 numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    model, settings, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        load_extractor(ref(tmp_path, model, **settings))
    assert str(caught.value).startswith(f"{tmp_path}/model.onnx: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"an ONNX file needs {package}; pip install 'ditflow\[onnx\]'"):
        load_extractor(ref(tmp_path))


def test_other_hashes_and_missing_files_are_refused(tmp_path: Path) -> None:
    reference = ref(tmp_path).model_copy(update={"sha256": 64 * "0"})
    for read in (load_extractor, weights_sha256):
        with pytest.raises(InputError, match=f"model.onnx: its sha256 is .*, not the expected {64 * '0'}"):
            read(reference)
    with pytest.raises(InputError, match="none.onnx: no such object.*evaluate.extractor.weights"):
        load_extractor(reference.model_copy(update={"weights": str(tmp_path / "none.onnx")}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "onnx"}, "needs onnx: its name, side, mean and deviation"),
        ({"name": "dinov2", "onnx": SETTINGS}, "onnx is for name: onnx alone"),
        (
            {"name": "onnx", "onnx": SETTINGS | {"name": "inception-tf"}},
            "inception-tf is the name of another extractor",
        ),
        ({"name": "onnx", "onnx": SETTINGS | {"name": "A B"}}, "should match pattern"),
        ({"name": "onnx", "onnx": SETTINGS | {"deviation": (1, 0, 1)}}, "greater than 0"),
        ({"name": "onnx", "onnx": SETTINGS | {"class_names": ["cat"]}}, "class_names needs logits"),
    ],
)
def test_configs_that_do_not_fit_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ExtractorRef.model_validate({"weights": "."} | values)


def evaluated(root: Path, folder: Path, samples: SampleManifest, **settings: Any) -> MetricsManifest:
    config = EvaluateConfig(extractor=ref(folder, logits="logits", spatial="quarters", **settings), batch_size=7)
    return tiny.run_evaluate(root, config, samples)


def test_evaluation_by_any_network(root: Path, tmp_path: Path, samples: SampleManifest) -> None:
    metrics = evaluated(root, tmp_path, samples, class_names=tiny.CLASSES)
    data = (tmp_path / "model.onnx").read_bytes()
    assert metrics.distance == f"FD[small@{uri.sha256(data)[:8]}]"
    assert {"fd", "fd_low", "fd_floor", "sfd", "kd", "precision_fp32", "classifier_score"} <= set(metrics.metrics)
    images, labels = (RowReader(samples).array(name) for name in ("image", "label"))
    extractor = load_extractor(ref(tmp_path, logits="logits", class_names=tiny.CLASSES))
    assert isinstance(extractor, Classifier)
    assert metrics.metrics["recognised"] == (extractor.classify(images).numpy() == labels).mean()


def test_two_preprocessings_of_one_file_are_two_extractors(root: Path, tmp_path: Path, samples: SampleManifest) -> None:
    one, other = (evaluated(root, tmp_path, samples, mean=mean) for mean in (MEAN, (0.5, 0.25, 0.0)))
    assert one.digest != other.digest
    assert one.metrics != other.metrics
    assert differing(one.conditions, other.conditions) == ["extractor_preprocessing"]
    kept = [metrics.parent("reference", ReferenceManifest).digest for metrics in (one, other)]
    assert kept[0] != kept[1]


def test_a_plan_counts_on_kept_statistics_of_the_same_preprocessing_alone(
    root: Path, tmp_path: Path, samples: SampleManifest, shards: ShardManifest, latents: LatentManifest
) -> None:
    def output(config: EvaluateConfig) -> StageOutput:
        inputs = {"extractor": weights_sha256(config.extractor)}
        return stage_output(str(root), "evaluate", 1, config, parents={"samples": samples}, inputs=inputs)

    def seconds(config: EvaluateConfig, *earlier: MetricsManifest) -> float:
        before = {manifest.stage: manifest for manifest in (shards, latents, *earlier)}
        rates = {"evaluate": 1.0, "compare": 1e9, "load": 1e9}
        cost = evaluate.estimate(config, samples, PlanContext(output(config), rates, 1, 1, before))
        return cost.seconds

    one, other = (EvaluateConfig(extractor=ref(tmp_path, mean=mean)) for mean in (MEAN, (0.5, 0.25, 0.0)))
    made = evaluate.run(one, samples, out=output(one), tracker=tiny.Recorder())
    assert seconds(one) - seconds(one, made) == pytest.approx(tiny.COUNT, rel=1e-3)
    assert seconds(other, made) == seconds(other)
