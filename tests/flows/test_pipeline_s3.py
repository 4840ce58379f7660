"""The whole pipeline with its images and its outputs on S3, as a user runs it, on normalised channels."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest
from pipelines import EVERYTHING, KEPT, arguments, ditflow
from s3_endpoint import BUCKET, SECRET, s3_server

SETS = (
    "--set",
    "train.normalise=channel",
    "--set",
    "train.milestones=15",
    "--set",
    "evaluate_milestones.sample.count=20",
)
STEPS = (15, 15, 30, 30)  # each sampled and evaluated


@pytest.mark.full
def test_the_pipeline_on_s3(tmp_path: Path, digits: Path, migrated: Callable[[Path], None]) -> None:
    migrated(tmp_path / "runs")
    with s3_server() as given:
        env = os.environ | given | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        env.pop("MLFLOW_TRACKING_URI", None)
        client = boto3.client(
            "s3",
            endpoint_url=given["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        for image in digits.rglob("*.png"):
            client.upload_file(str(image), BUCKET, f"digits/{image.relative_to(digits)}")
        places = (f"s3://{BUCKET}/runs", f"s3://{BUCKET}/digits")
        run = ditflow(*arguments("run", *places, *SETS))
        first = subprocess.run(run, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        report = json.loads(first.stdout)
        assert {stage["name"]: stage["state"] for stage in report["stages"]} == dict.fromkeys(EVERYTHING, "ran")
        assert all(stage["manifest"].startswith(f"s3://{BUCKET}/runs/") for stage in report["stages"])
        assert [(each["step"], each["state"]) for each in report["milestones"]] == [(step, "ran") for step in STEPS]
        follow = ditflow(*arguments("milestones", *places, *SETS))
        followed = subprocess.run(follow, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        assert followed.returncode == 0, followed.stderr
        states = [(each["step"], each["state"]) for each in json.loads(followed.stdout)["milestones"]]
        assert states == [(step, "skipped") for step in STEPS]
        verify = ditflow("verify", "--full", f"s3://{BUCKET}/runs")
        seen = subprocess.run(verify, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        assert seen.returncode == 0, seen.stdout
        kinds = ("all bytes as committed", ": the chain ends in ", ": the registered files are those of the checkpoint")
        assert all(any(kind in line for kind in kinds) for line in seen.stdout.splitlines()), seen.stdout
        assert all(stage["manifest"].removesuffix("/manifest.json") in seen.stdout for stage in report["stages"])

        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        keys = [entry["Key"] for page in pages for entry in page["Contents"]]
        assert sum(key.startswith("digits/") for key in keys) == 10 * sum(KEPT.values())
        objects = [client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys]
    here = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    said = [first.stdout.encode(), first.stderr.encode(), seen.stdout.encode()]
    assert not any(SECRET.encode() in data for data in [*objects, *here, *said])
