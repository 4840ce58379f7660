"""``ls``, ``show``, ``tree``, ``diff``, ``pin`` and ``gc`` on roots, and what gc keeps."""

import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import refused
from faults import start
from mlflow import MlflowClient
from outputs import made, planned, twenty_recipes
from small import Small
from test_collect import check_sound

from flows import claims, keeping, processes
from flows.command.main import main
from flows.launch import slurm_queue
from flows.registry.config import ModelManifest, RegisterConfig
from flows.tracking import runs
from storage import collect, uri, verify
from storage.cost import metered
from storage.manifest import Manifest, key_of


class Fixed:
    """A gauge that always says the same."""

    device = "meter"

    def __init__(self, joules: float | None) -> None:
        self.unread = "" if joules is not None else "no meter"
        self._joules = joules or 0.0

    def peak_memory(self) -> int:
        return 2**30

    def joules(self) -> float:
        return self._joules


def said(capsys: pytest.CaptureFixture[str], *arguments: str, root: object) -> str:
    assert main([*arguments, "--root", str(root)]) == 0
    return capsys.readouterr().out


def told(capsys: pytest.CaptureFixture[str], *arguments: str, root: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said(capsys, *arguments, "--json", root=root).splitlines()]


def collected(capsys: pytest.CaptureFixture[str], *arguments: str, root: object) -> set[str]:
    (summary,) = told(capsys, "gc", "--days", "0", *arguments, root=root)
    return {each["output"] for each in summary["outputs"]}


@pytest.fixture(params=["local", "memory"])
def either(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}"


def test_outputs_are_listed(either: str, capsys: pytest.CaptureFixture[str]) -> None:
    shards = made(planned(either, "shard", recipe="a-00000000"), counts={"images": 1200})
    trained = made(planned(either, "train", recipe="a-00000000", shards=shards), metrics={"final_loss": 0.25})
    begun = planned(either, "sample", checkpoint=trained)
    begun.begin()
    rows = told(capsys, "ls", root=either)
    assert [(each["output"], each["recipe"], each["state"], each["number"]) for each in rows] == [
        (key_of(shards.uri), "a-00000000", "finished", "1,200 images"),
        (key_of(trained.uri), "a-00000000", "finished", "loss 0.25"),
        (key_of(begun.uri), "", "unfinished", ""),
    ]
    assert rows[0]["size"] == sum(entry.size for entry in shards.files)
    header, first, *_ = said(capsys, "ls", root=either).splitlines()
    assert header.split() == ["recipe", "stage", "output", "age", "size", "number", "names"]
    assert first.split()[:3] == ["a-00000000", "shard", shards.folder_name]


def test_costs_are_summed_by_recipe_and_month(either: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value, joules in enumerate((7200.0, None, 3600.0)):
        out = planned(either, "train", value, recipe="a-00000000")
        with metered(out.uri, Fixed(joules)):
            time.sleep(0.002)  # costs are told in milliseconds
            made(out)
    with metered(planned(either, "train", 4, recipe="b-00000000").uri, Fixed(1.0)):
        pass  # killed, and not begun again
    made(planned(either, "shard"))
    month = f"{datetime.now(UTC):%Y-%m}"
    rows = told(capsys, "ls", "--cost", root=either)
    assert [(each["recipe"], each["month"], each["outputs"], each["measured"]) for each in rows] == [
        ("", month, 2, 1),
        ("a-00000000", month, 3, 3),
    ]
    assert (rows[1]["energy_joules"], rows[1]["peak_memory"]) == (10_800.0, 2**30)
    assert 0 < rows[1]["energy_device_seconds"] < rows[1]["device_seconds"]
    header, first, second, total = said(capsys, "ls", "--cost", root=either).splitlines()
    assert header.split()[:4] == ["recipe", "month", "outputs", "measured"]
    assert first.split()[0] == "-" and second.split()[:4] == ["a-00000000", month, "3", "3"]
    assert total.split()[:3] == ["all", "5", "4"]
    newest = told(capsys, "ls", root=either)[2]
    assert newest["cost"]["energy_joules"] in (7200.0, None, 3600.0)
    shown = said(capsys, "show", newest["digest"], root=either)
    assert "device-hours, peak memory 1 GiB" in shown


def test_an_output_has_many_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path)
    older = made(planned(root, "train", 1, "a-00000000"))
    newer = made(planned(root, "train", 2, "a-00000001"))
    names = {
        newer.digest: newer,
        newer.folder_name[:8]: newer,
        f"train/{older.folder_name[:4]}": older,
        "a": newer,
        "a-00000000": older,
        "a/train": newer,
        older.uri: older,
        older.url: older,
    }
    for name, expected in names.items():
        (found,) = told(capsys, "show", name, root=root)
        assert found["digest"] == expected.digest
    line = refused(capsys, ["show", "b", "--root", root])
    assert line == f"error: b: no such output in {root}; `ditflow ls` lists recipes, stages and digits"
    assert "no such output" in refused(capsys, ["show", "abc", "--root", root])
    shutil.copytree(root, tmp_path / "copy")
    copied = str(tmp_path / "copy" / "train" / older.folder_name)
    assert "name its root with --root" in refused(capsys, ["show", copied, "--root", root])
    assert "no such folder" in refused(capsys, ["ls", "--root", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_digits_that_several_have_are_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0123456789abcdef", "0123456789abcdee"):
        (tmp_path / "train" / name).mkdir(parents=True)
    line = refused(capsys, ["show", "0123", "--root", str(tmp_path)])
    assert line == (
        "error: 0123: 2 outputs begin so (train/0123456789abcdee, train/0123456789abcdef); give more digits"
    )


def test_an_output_is_shown_with_who_uses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path)
    shards = made(planned(root, "shard", 3), counts={"images": 5})
    latents = made(planned(root, "encode", recipe="b-00000000", shards=shards))
    (found,) = told(capsys, "show", shards.folder_name, root=root)
    assert found["used_by"] == [{"output": key_of(latents.uri), "recipe": "b-00000000", "number": ""}]
    assert found["config"] == {"value": 3}
    assert told(capsys, "show", latents.folder_name, root=root)[0]["inputs"] == {"shards": key_of(shards.uri)}
    text = said(capsys, "show", shards.folder_name, root=root)
    assert f"used by\n  {key_of(latents.uri)}  b-00000000" in text
    assert text.endswith("config\nvalue: 3\n")


def test_the_tree_goes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path)
    first = key_of(twenty_recipes(root)[0].uri)
    (found,) = told(capsys, "tree", first, root=root)
    chain, node = [], found["made_from"]
    while node:
        chain.append(node["output"].partition("/")[0])
        node = next((each for each in node["nodes"] if each["role"] != "reference"), None)
    assert chain == ["evaluate", "sample", "train", "encode", "shard"]
    assert {each["output"].partition("/")[0] for each in found["used_by"]["nodes"]} == {"reports"}
    shutil.rmtree(tmp_path / "shard")
    assert said(capsys, "tree", first, root=root).splitlines()[5].strip().endswith("as shard  gone")


def test_two_outputs_are_compared_with_all_behind_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path)
    shards = [made(planned(root, "shard", value)) for value in (1, 2)]
    trained = [
        made(planned(root, "train", 5, shards=each), metrics={"final_loss": loss})
        for each, loss in zip(shards, (0.1, 0.2), strict=True)
    ]
    one, other = (each.folder_name for each in trained)
    (found,) = told(capsys, "diff", one, other, root=root)
    assert [each["config"] for each in found["differences"]] == [{}, {"value": [1, 2]}]
    assert found["differences"][0]["inputs"] == {"shards": [key_of(each.uri) for each in shards]}
    assert found["numbers"] == {"final_loss": [0.1, 0.2]}
    text = said(capsys, "diff", one, other, root=root)
    assert "  config  value  1  2\n" in text
    assert "no difference" in said(capsys, "diff", one, one, root=root)


def test_what_is_pinned_stays(either: str, capsys: pytest.CaptureFixture[str]) -> None:
    evaluations = twenty_recipes(either)
    pinned, everything = evaluations[4].folder_name, {key_of(each.uri) for each in verify.outputs(either)}
    lineage = {key_of(each.uri) for each in verify.outputs(evaluations[4].uri)}
    said(capsys, "pin", pinned, "--reason", "the paper's", root=either)
    assert told(capsys, "show", pinned, root=either)[0]["names"] == ["pinned"]
    assert collected(capsys, root=either) == everything - lineage
    assert collected(capsys, "--delete", root=either) == everything - lineage
    assert collected(capsys, root=either) == set()
    check_sound(either)
    said(capsys, "unpin", pinned, root=either)
    assert "is not pinned" in refused(capsys, ["unpin", pinned, "--root", either])
    assert collected(capsys, "--delete", root=either) == lineage


def test_days_that_are_no_number_are_told_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gc", "--days", "week"])
    assert "--days: week: must be a number of at least 0" in capsys.readouterr().err


def test_nothing_is_deleted_unless_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twenty_recipes(str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert "can go; the same command with --delete deletes it" in said(capsys, "gc", "--days", "0", root=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert "53 young" in said(capsys, "gc", "--delete", root=tmp_path)
    assert "nothing can go" in said(capsys, "gc", root=tmp_path)


def test_what_is_left_does_not_count_as_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = made(planned(str(tmp_path), "shard"))
    monkeypatch.setattr(collect, "delete", lambda *_: [shards.uri])  # somebody has written to it
    lines = said(capsys, "gc", "--delete", "--days", "0", root=tmp_path).splitlines()
    assert lines[-2:] == [f"{shards.uri}: left, since somebody has written to it just now", "nothing to delete"]


def test_a_name_of_recipes_is_kept_and_one_of_none_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twenty_recipes(str(tmp_path))
    everything = collected(capsys, root=tmp_path)
    kept = everything - collected(capsys, "--keep", "recipe7", "--keep", "recipe3-00000003", root=tmp_path)
    assert len([key for key in kept if key.startswith("evaluate/")]) == 2
    line = refused(capsys, ["gc", "--keep", "recipe77", "--root", str(tmp_path)])
    assert line == "error: recipe77: neither a recipe nor the name of one that `ditflow ls` shows"


def test_what_a_process_works_with_stays_until_it_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluations = twenty_recipes(str(tmp_path))
    needed = {key_of(each.uri) for each in verify.outputs(evaluations[6].uri)}
    script = "import sys, time; from flows.claims import claim; claim(*sys.argv[1:2], sys.argv[2:]); print(flush=True)"
    process = start(f"{script}; time.sleep(600)", tmp_path, key_of(evaluations[6].uri))
    assert process.stdout is not None
    process.stdout.readline()
    assert not needed & collected(capsys, root=tmp_path)
    process.kill()
    process.communicate()
    assert needed < collected(capsys, root=tmp_path)


WORKING = """
import sys, time
from prefect import flow
from dit.encode import EncodeConfig
from flows.contract import STAGES
from flows.perform import RunSettings, perform

def work(config, source, *, out, tracker):
    out.put("records/0.json", b"{}")
    print(out.uri, flush=True)
    time.sleep(600)

@flow
def encode(root, shards):
    config = EncodeConfig(vae=None, resolution=8, flips=False)
    perform(STAGES["encode"], config, shards, RunSettings(root=root), run=work)

encode(*sys.argv[1:])
"""


def test_a_stage_that_runs_keeps_its_output_and_what_it_reads(
    root: Path, prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Small(root, tracked=False).latents().parent("shards", Manifest)
    process = start(WORKING, root, shards.url)
    assert process.stdout is not None
    working = process.stdout.readline().strip()
    latents = [each.uri for each in verify.outputs(str(root)) if isinstance(each, Manifest) and each.stage == "encode"]
    try:
        assert working not in latents
        assert collected(capsys, "--delete", root=root) == {key_of(each) for each in latents}
    finally:
        process.kill()
        process.communicate()
    assert collected(capsys, "--delete", root=root) == {key_of(working), key_of(shards.uri)}


def recipe_file(place: Path, digits: Path, **train: Any) -> Path:
    values = {
        "name": place.stem,
        "archive": {"train": str(digits / "train"), "held_out": str(digits / "held_out")},
        "shard": {"images_per_shard": 50},
        "encode": {"vae": None, "resolution": 16, "flips": False},
        "train": {"steps": 2, "batch_size": 8, "model": {"kind": "dit", "size": {"depth": 1, "width": 32, "heads": 2}}}
        | train,
        "sample": {"count": 4, "steps": 2},
    }
    place.write_text(yaml.safe_dump(values))
    return place


def test_a_kept_recipe_and_a_registered_version_keep_all_they_were_made_from(
    root: Path, prefect_api: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    small = Small(root)
    latents = small.latents()
    version = small.registered(small.evaluated(small.checkpoint(latents)), RegisterConfig(model_name="kept"))
    other = small.checkpoint(latents, steps=3)
    lineage = {key_of(each.uri) for each in verify.outputs(version.uri)}
    rows = {each["output"]: each for each in told(capsys, "ls", root=root)}
    assert rows[key_of(version.uri)]["names"] == ["kept/1 @candidate"]
    assert [key for key, each in rows.items() if each["names"] and key.startswith("train/")] != []
    assert told(capsys, "show", "models:/kept@candidate", root=root)[0]["output"].startswith("train/")
    assert collected(capsys, root=root) == {key_of(other.uri)}
    assert collected(capsys, "--delete", root=root) == {key_of(other.uri)}
    client = MlflowClient(runs.tracking_uri(str(root)))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'other.db'}")
        shutil.copy(root / "mlflow.db", root / "other.db")
        there = MlflowClient(f"sqlite:///{root / 'other.db'}")
        there.delete_registered_model("kept")
        for run in there.search_runs(["1"]):
            there.delete_run(run.info.run_id)
        assert collected(capsys, root=root) == lineage  # it knows the run, and not the version
    client.delete_model_version("kept", "1")
    assert collected(capsys, root=root) == lineage
    recipe, shards = recipe_file(root / "mine.yaml", root / "digits"), latents.parent("shards", Manifest)
    kept = lineage - collected(capsys, "--keep", str(recipe), root=root)
    assert kept == {key_of(shards.uri), key_of(latents.uri)}


def test_a_registration_in_an_mlflow_that_does_not_know_it_stays(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model_name": "elsewhere", "model_version": 3, "alias": "candidate"}
    out = planned(str(root), "register").made_by(mlflow_run_id="f" * 32)
    registered = out.commit(ModelManifest, [], **fields)
    (summary,) = told(capsys, "gc", "--days", "0", root=root)
    assert summary["kept"] == {key_of(registered.uri): "registered as elsewhere/3, in another MLflow"}


def test_what_a_submitted_job_reads_and_makes_stays(either: str, capsys: pytest.CaptureFixture[str]) -> None:
    latents = made(planned(either, "encode"))
    out = planned(either, "train", latents=latents)
    out.begin()
    note = out.url(slurm_queue.FOLDER, slurm_queue.NOTE)
    uri.write(note, b"{}")
    uri.write(uri.join(either, "lost+found", "0123456789abcdef", "file"), b"of the file system")
    (summary,) = told(capsys, "gc", "--days", "0", root=either)
    assert summary["kept"] == {key_of(out.uri): keeping.WORKING, key_of(latents.uri): ""}
    uri.remove_tree(note, out.uri)
    assert collected(capsys, root=either) == {key_of(out.uri), key_of(latents.uri)}


def test_mlflow_must_answer_before_anything_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twenty_recipes(str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert "MLflow does not answer" in refused(capsys, ["gc", "--days", "0", "--root", str(tmp_path)], code=1)


def test_two_deletions_of_one_root_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twenty_recipes(str(tmp_path))
    claims.claim(str(tmp_path), ["shard/0123456789abcdef"])
    with claims.deleting(str(tmp_path)):
        pass
    processes.leave(str(tmp_path))
    assert collected(capsys, "--delete", root=tmp_path)
    assert uri.names(str(tmp_path / "shard")) == []
