"""Which process and which network a checkpoint of others was trained for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from other_checkpoints import Weights, options, refusal, saved
from random_dit import pretrained, random_dit
from safetensors.torch import save_file

from dit.convert import read, write
from dit.diffusion.config import DiffusionConfig
from dit.vae import VaeRef
from storage import uri
from storage.errors import InputError

ASSUMED = "assumed: it predicts noise of 1000 linear steps, as the published DiT; SiT and REPA, trained by flow"
ASK = "pass --process flow if its time is 0 at the noise (SiT, LightningDiT), or reversed-flow if it is 1 there (REPA)"


@pytest.fixture
def weights() -> Weights:
    return dict(random_dit().state_dict())


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        (
            {"args": options(model="SiT-XL/2", path_type="Linear", prediction="velocity")},
            "args.model is SiT-XL/2, so it was",
        ),
        ({"args": options(path_type="Linear")}, "args.path_type is Linear, so it was"),
        ({"args": options(prediction="v")}, "its args.prediction is v, so it was"),
        ({"args": {"model": "SiT-B/2"}}, "its args.model is SiT-B/2, so it was"),
        ({"config": {"transport": {"path_type": "Linear"}}}, "its config.transport.path_type is Linear, so it was"),
        ({"hyper_parameters": {"model_type": "LightningDiT-XL/1"}}, "model_type is LightningDiT-XL/1, so it was"),
    ],
)
@pytest.mark.parametrize("hints", [{}, {"process": "gaussian"}])
def test_a_flow_that_says_so_is_asked_for_its_time(
    tmp_path: Path, weights: Weights, beside: dict[str, Any], reason: str, hints: Any
) -> None:
    message = refusal(saved(tmp_path, {"ema": weights} | beside), **hints)
    assert reason in message
    assert message.endswith(f"trained by flow matching; {'it does not predict noise; ' if hints else ''}{ASK}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v_prediction"),
        ("predict_xstart", True),
        ("noise_schedule", "squaredcos_cap_v2"),
        ("diffusion-steps", 4000),
    ],
)
def test_another_diffusion_is_refused(tmp_path: Path, weights: Weights, key: str, value: object) -> None:
    message = refusal(saved(tmp_path, {"ema": weights, "args": {key: value}}))
    assert f"x.pt: its args.{key} is {value}, another process" in message


def test_metadata_of_safetensors_is_read_too(tmp_path: Path, weights: Weights) -> None:
    save_file(weights, tmp_path / "x.safetensors", metadata={"path_type": "Linear"})
    assert "its path_type is Linear" in refusal(tmp_path / "x.safetensors")
    memory = "memory://convert-metadata/x.safetensors"
    uri.write(memory, (tmp_path / "x.safetensors").read_bytes())
    assert "its path_type is Linear" in refusal(memory)
    save_file(weights, tmp_path / "x.safetensors", metadata={"format": "pt", "prediction": "noise"})
    assert read(str(tmp_path / "x.safetensors"), heads=4).notes == ()


def test_without_a_word_of_the_process_the_assumption_is_named(tmp_path: Path, weights: Weights) -> None:
    source = saved(tmp_path, weights)
    found = read(source, heads=4)
    assert found.diffusion == DiffusionConfig()
    assert [note for note in found.notes if note.startswith(ASSUMED)] == list(found.notes)
    assert read(source, heads=4, process="gaussian").notes == ()
    named = saved(tmp_path, {"ema": weights, "args": options(model="DiT-XL/2")})
    assert read(named, heads=4).notes == ("read from ema",)


@pytest.mark.parametrize("name", ["SiT-XL-2-256x256.pt", "repa_last.pt", "lightningdit-xl.pt"])
def test_a_flows_name_is_refused_unless_the_user_knows_better(tmp_path: Path, weights: Weights, name: str) -> None:
    source = saved(tmp_path, weights, name)
    assert "flow matching" in refusal(source)
    assert read(source, heads=4, process="gaussian").notes == ()
    read(saved(tmp_path, weights, "sitting-dit.pt"), heads=4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blocks.0.mlp.w12.weight", f"LightningDiT's or the like, which was trained by flow matching; {ASK}"),
        ("feat_rope.freqs_cos", f"LightningDiT's or the like, which was trained by flow matching; {ASK}"),
        ("projectors.0.0.weight", f"is REPA's, whose models are flows; {ASK}"),
    ],
)
def test_tensors_of_flows(tmp_path: Path, weights: Weights, name: str, reason: str) -> None:
    assert f"tensor {name} " in (message := refusal(saved(tmp_path, weights | {name: torch.ones(1)})))
    assert reason in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformer_blocks.0.attn1.to_q.weight", "is diffusers'; name the folder of this file"),
        ("encoder.conv_in.weight", "is an autoencoder's; pass that as --vae"),
        ("model.diffusion_model.input_blocks.0.0.weight", "is a U-Net's"),
        ("joint_blocks.0.weight", "no tensor x_embedder.proj.weight, but such as joint_blocks.0.weight"),
    ],
)
def test_files_without_a_dit(tmp_path: Path, name: str, reason: str) -> None:
    assert reason in refusal(saved(tmp_path, {name: torch.ones(1)}))


def pipeline(tmp_path: Path, vae: VaeRef, **scheduler: object) -> Path:
    folder = tmp_path / "pipeline"
    write(pretrained(random_dit()), str(folder), "pipeline", vae=vae.source)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    return folder


def test_the_scheduler_of_a_pipeline_names_its_process(tmp_path: Path, vae: VaeRef) -> None:
    found = read(str(pipeline(tmp_path, vae, beta_end=0.03, num_train_timesteps=500)))
    assert (found.diffusion, found.notes) == (DiffusionConfig(beta_end=0.03, steps=500), ())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is that of a flow on diffusers' time scale"),
        ({"prediction_type": "v_prediction"}, "prediction_type: Input should be 'epsilon'"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule: Input should be 'linear'"),
    ],
)
def test_schedulers_of_other_processes(tmp_path: Path, vae: VaeRef, fields: dict[str, Any], reason: str) -> None:
    folder = pipeline(tmp_path, vae, **fields)
    with pytest.raises(InputError) as caught:
        read(str(folder))
    assert reason in str(caught.value)
