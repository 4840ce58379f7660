"""Any network as a feature extractor: an ONNX file, and the preprocessing and the outputs that the config names.

The file is untrusted. It is read as one piece: tensors that it keeps in other files are refused, and no library of
custom operators is loaded. Time and memory of its run have no limit, so an unknown file can still fill the machine.
"""

# B = batch, H, W = image sides, D = features, C = classes, S = spatial features

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from dit.metrics.extractors.base import Images, Outputs, checked
from dit.metrics.extractors.resize import resize_bicubic, resize_tf1
from dit.weights import WeightsFile, read_weights
from storage import uri
from storage.config import Config
from storage.errors import InputError, one_line
from storage.parallel import threads

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

FILE: Final = WeightsFile(
    "model.onnx",
    title="an ONNX network",
    hint="onnx reads model.onnx, or the file that evaluate.extractor.weights names",
)
BATCH: Final = 8
"""Images in one run, unless the file has a fixed number. Always as many, so the batch changes no bit."""
MAX_BATCH: Final = 1024
"""Most images in one run."""
MAX_DIMS: Final = 8192
"""Most features: their covariance has as many rows and columns."""
RESIZE: Final = {"pillow-bicubic": resize_bicubic, "tf1-bilinear": resize_tf1}
Colours = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class OnnxNetwork(Config):
    """What an ONNX file takes and gives. Its input is float32 (B, 3, side, side): (pixels / 255 - mean) / deviation."""

    name: str = Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=40)
    """Name of the network, in small letters, for the distance: ``FD[name@sha256]``."""
    side: int = Field(ge=1, le=2048)
    """Side of the images that it takes, in pixels. Other images are resized."""
    resize: Literal["pillow-bicubic", "tf1-bilinear"] = "pillow-bicubic"
    """How images of another side are resized: with antialiasing as by Pillow, or as for Inception."""
    mean: Colours
    """Mean of red, green and blue, of pixels in 0..1: it is subtracted."""
    deviation: tuple[Positive, Positive, Positive]
    """Deviation of red, green and blue, of pixels in 0..1: what is left is divided by it."""
    features: str = "features"
    """Name of the output with the features, (B, D)."""
    logits: str | None = None
    """Name of the output with the logits of its classes, (B, C). Default: none, and there is no classifier score."""
    spatial: str | None = None
    """Name of the output with spatial features, of any shape. Default: none, and there is no spatial distance."""
    class_names: tuple[str, ...] = ()
    """Names of its classes, in the order of the logits. With them the share of samples that it recognises as the
    requested class is measured, if the training images have no other classes."""

    @model_validator(mode="after")
    def _classes_need_logits(self) -> Self:
        if self.class_names and self.logits is None:
            raise ValueError("class_names needs logits, the name of the output with the logits")
        return self

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs: features, and then logits and spatial features if there are any."""
        return [name for name in (self.features, self.logits, self.spatial) if name is not None]

    @property
    def preprocessing(self) -> str:
        """Id of all that changes the outputs, besides the file."""
        colours = "/".join(",".join(f"{value:.9g}" for value in part) for part in (self.mean, self.deviation))
        return f"{self.resize}-{self.side}/{colours}/{','.join(self.outputs)}"


@dataclass(frozen=True)
class OnnxExtractor:
    """A network of an ONNX file as a `dit.metrics.extractors.base.FeatureExtractor`, in float32 on the CPU."""

    network: OnnxNetwork
    session: "InferenceSession"
    sha256: str
    batch: int
    """Images in one run."""
    dims: int
    version: int = 1
    published: bool = False

    @property
    def name(self) -> str:
        """Name of the network, as the config says."""
        return self.network.name

    @property
    def preprocessing(self) -> str:
        """Id of the preprocessing and of the outputs."""
        return self.network.preprocessing

    def __call__(self, images: Images) -> Tensor:
        """Features float32 (B, D); images and errors as in `outputs`."""
        return self.outputs(images).features

    def outputs(self, images: Images) -> Outputs:
        """Features (B, D), and logits (B, C) and spatial features (B, S) if named, of images uint8 (B, H, H, 3).

        Raises:
            InputError: the images have another type or shape.
        """
        x = self._normalised(checked(images, self.name, torch.device("cpu")))
        with threads(torch.get_num_threads()) as pool:
            return Outputs.of(list(pool.map(self._run, x.split(self.batch))))

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Images uint8 (B, H, H, 3) as the network takes them, float32 (B, 3, side, side)."""
        x = RESIZE[self.network.resize](pixels.permute(0, 3, 1, 2).float(), self.network.side)
        mean, deviation = (torch.tensor(each).view(3, 1, 1) for each in (self.network.mean, self.network.deviation))
        return (x / 255 - mean) / deviation

    def _run(self, x: Tensor) -> Outputs:
        """The outputs for at most `batch` images; the run is filled up with zeros."""
        filled = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.batch - len(x)))
        values = self.session.run(self.network.outputs, {self.session.get_inputs()[0].name: filled.numpy()})
        flat = [torch.from_numpy(value).flatten(1)[: len(x)] for value in values]
        given, network = dict(zip(self.network.outputs, flat, strict=True)), self.network
        return Outputs(given[network.features], given.get(network.logits or ""), given.get(network.spatial or ""))


@dataclass(frozen=True)
class OnnxClassifier(OnnxExtractor):
    """The same with the names of its classes, as a `dit.evaluate.Classifier`."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of its classes."""
        return self.network.class_names

    def classify(self, images: Images) -> Tensor:
        """Labels int64 (B,) of images uint8 (B, H, H, 3); errors as in `outputs`."""
        logits = self.outputs(images).logits
        assert logits is not None
        return logits.argmax(1)


def load_onnx(url: str, sha256: str | None, network: OnnxNetwork) -> OnnxExtractor:
    """The extractor; a classifier if its classes are named.

    Args:
        url: the file, or the folder that contains it as ``model.onnx``, by path or fsspec URL.
        sha256: the hash that the file must have; None accepts any file.
        network: what it takes and gives.

    Raises:
        InputError: onnxruntime is not installed; the file is missing, has another hash, is no ONNX file, has weights
            in other files, cannot be run on such images, or lacks an output.
    """
    place = FILE.url(url)
    data, digest = read_weights(place, sha256, FILE.hint)
    try:
        session = _session(data)
        batch = _batch(session, network)
        widths = _widths(session, network, batch)
    except InputError as error:
        raise InputError(f"{uri.redact(place)}: {error}") from error
    kind = OnnxClassifier if network.class_names else OnnxExtractor
    return kind(network, session, digest, batch, widths[network.features])


def _session(data: bytes) -> "InferenceSession":
    """The network of a file, ready to run."""
    try:
        import onnx
        import onnxruntime as ort
    except ImportError as error:
        raise InputError(f"an ONNX file needs {error.name}; pip install 'ditflow[onnx]'") from error
    try:
        _refuse_other_files(onnx.load_model_from_string(data))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1  # several runs side by side are faster, and have the same bits
        options.log_severity_level = 4  # the exception says it
        options.add_session_config_entry("session.load_model_format", "ONNX")  # what was checked, and no other
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except InputError:
        raise
    except Exception as error:  # protobuf and onnxruntime promise no exception types
        raise InputError(f"not an ONNX file that onnxruntime can run ({one_line(error)})") from error


def _refuse_other_files(model: "ModelProto") -> None:
    """Check that all tensors are in the file itself, also those of functions and of branches."""
    for message in _messages(model):
        if message.DESCRIPTOR.name == "TensorProto" and message.external_data:
            raise InputError("has weights in other files; save it as one: onnx.save(onnx.load('it.onnx'), 'one.onnx')")


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(each)


def _batch(session: "InferenceSession", network: OnnxNetwork) -> int:
    """Check what the network takes; return the number of images in one run."""
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise InputError(f"takes {len(inputs)} inputs ({_listed(inputs)}); export it with images alone")
    shape, kind = inputs[0].shape, inputs[0].type
    if kind != "tensor(float)":
        raise InputError(f"takes {kind}; export it with images in float32, tensor(float)")
    if len(shape) == 4 and shape[3] == 3 != shape[1]:
        raise InputError(f"takes {shape}, channels last; put a Transpose in front of it, for images (B, 3, H, W)")
    wanted = (None, 3, network.side, network.side)
    sizes = zip(shape[1:], wanted[1:], strict=False)
    if len(shape) != 4 or any(isinstance(size, int) and size != want for size, want in sizes):
        raise InputError(f"takes {shape}, not (B, 3, {network.side}, {network.side}); correct onnx.side or the file")
    batch = shape[0] if isinstance(shape[0], int) else BATCH
    if not 1 <= batch <= MAX_BATCH:
        raise InputError(f"takes {batch:,} images at once, not 1 to {MAX_BATCH:,}; export it with a dynamic batch")
    return batch


def _widths(session: "InferenceSession", network: OnnxNetwork, batch: int) -> dict[str, int]:
    """Check what the network gives, by a run on black images; return the numbers of each output for one image."""
    known = session.get_outputs()
    missing = [name for name in network.outputs if name not in {output.name for output in known}]
    if missing:
        raise InputError(f"has no output {missing[0]!a}; it has {_listed(known)}")
    black = np.zeros((batch, 3, network.side, network.side), np.float32)
    try:
        values = session.run(network.outputs, {session.get_inputs()[0].name: black})
    except Exception as error:  # onnxruntime promises no exception types
        raise InputError(f"cannot be run on {batch} images of {network.side} px ({one_line(error)})") from error
    widths = {name: _width(name, value, batch) for name, value in zip(network.outputs, values, strict=True)}
    if network.class_names and len(network.class_names) != widths[str(network.logits)]:
        names = f"onnx.class_names has {len(network.class_names):,} names"
        raise InputError(f"has {widths[str(network.logits)]:,} logits, but {names}; name all classes in their order")
    return widths


def _width(name: str, value: Any, batch: int) -> int:
    """The numbers of an output for one image."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.ndim < 2 or len(value) != batch:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise InputError(f"output {name!a} is {found}, not float32 ({batch}, ...) for {batch} images")
    width = int(value[0].size)
    if not 0 < width <= MAX_DIMS:
        raise InputError(f"output {name!a} has {width:,} numbers for an image, not 1 to {MAX_DIMS:,}; name another one")
    return width


def _listed(values: Any) -> str:
    return ", ".join(ascii(value.name) for value in values)
