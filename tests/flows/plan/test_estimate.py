"""What a plan says against what then happens."""

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
import yaml
from command_line import SIDE, refused, tiny, write_images

from dit.models.build import build
from dit.models.choice import DataSpec
from dit.models.cost import cost
from flows.command.main import main
from flows.contract import STAGES
from flows.plan.estimate import plan, read_rates
from flows.plan.table import Plan
from flows.recipe import Recipe, load_recipe
from storage.errors import InputError
from storage.manifest import Manifest
from storage.rows.store import RowReader
from storage.tracker import NullTracker

RATES = """
list: 1_000
shard: 100
load: 50
encode: 10
train: 1.0e9
sample: 2.0e9
decode: 5
evaluate: 20
compare: 10_000
"""


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    (tmp_path / "rates.yaml").write_text(RATES)
    return tmp_path / "rates.yaml"


def recipe_of(images: Path, root: Path, *more: str) -> Recipe:
    options = tiny(images, root, "shard.images_per_shard=5", "encode.block_rows=8", "encode.chunk_rows=4", *more)
    return load_recipe("demo", options[3::2], str(root))


def planned(recipe: Recipe, root: Path, rates: Path) -> Plan:
    return plan(recipe, str(root), read_rates(str(rates)))


def perform(recipe: Recipe, root: Path, *names: str) -> list[Manifest]:
    """Run stages as they are, without Prefect or MLflow."""
    source, made = recipe.archive, list[Manifest]()
    for name in names:
        stage = STAGES[name]
        out = stage.output(str(root), recipe.config_of(name), source)
        source = stage.run(recipe.config_of(name), source, out=out, tracker=NullTracker())
        made.append(source)
    return made


def test_hours_follow_from_the_rates(images: Path, root: Path, rates: Path) -> None:
    recipe = recipe_of(images, root, "sample.guidance_scale=2", "encode.flips=true", "train.flips=true")
    found = planned(recipe, root, rates)
    lines = {line.stage: line for line in found.lines}
    assert list(lines) == ["shard", "encode", "train", "sample", "evaluate"]
    assert {line.state for line in found.lines} == {"to do"}
    work = cost(recipe.train.model.config(_given()))
    assert lines["shard"].hours * 3600 == pytest.approx(24 / 1_000 + 24 / 100)
    assert lines["encode"].hours * 3600 == pytest.approx(24 / 50 + 24 * 2 / 10)  # on a CPU one after the other
    assert lines["train"].hours * 3600 == pytest.approx(2 * 4 * 6 * work.macs / 1e9)
    assert lines["sample"].hours * 3600 == pytest.approx(6 * 2 * 2 * 2 * work.macs / 2e9 + 6 / 5)
    assert lines["evaluate"].hours * 3600 == pytest.approx(
        24 / 50 + (24 + 2 * 6) / 20 + (24 * 24 + 6 * 6 + 24 * 6) / 10_000
    )
    unguided = planned(recipe_of(images, root, "sample.guidance_scale=1"), root, rates)
    assert unguided.lines[3].hours * 3600 == pytest.approx(6 * 2 * 2 * work.macs / 2e9 + 6 / 5)


def test_money_is_that_of_all_ranks(images: Path, root: Path, rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of(images, root, "launch.nproc=2")
    found = plan(recipe, str(root), read_rates(str(rates)), 2.5)
    assert {line.stage: line.device_hours / line.hours for line in found.lines} == pytest.approx(
        {"shard": 1, "encode": 2, "train": 2, "sample": 2, "evaluate": 2}
    )
    assert found.money == pytest.approx(2.5 * sum(line.device_hours for line in found.lines))
    assert planned(recipe, root, rates).money is None
    header, *_, last = found.rows()
    assert header[-2:] == ("device-hours", "at 2.5") and last[-1] == f"{found.money:,.2f}"
    assert found.as_json()["money"] == found.money
    with pytest.raises(SystemExit):
        main(["plan", "demo", "--price", "-1"])
    assert "--price: -1: must be a number of at least 0" in capsys.readouterr().err


def test_a_guess_of_the_plan_is_said(images: Path, root: Path, rates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = ("train.diffusion={kind: flow}", "sample.sampler=dopri5", "sample.guidance_scale=1")
    recipe = recipe_of(images, root, *flow)
    found, work = planned(recipe, root, rates), cost(recipe.train.model.config(_given(learn_variance=False)))
    assert found.lines[3].hours * 3600 == pytest.approx(6 * 60 * 2 * work.macs / 2e9 + 6 / 5)
    assert found.guesses == ("sample: dopri5 with 60 passes for an image, which is a guess",)
    assert f"hours   {found.guesses[0]}" in found.needs()
    assert not planned(recipe_of(images, root), root, rates).guesses


def test_normalised_channels_change_nothing_in_a_plan(images: Path, root: Path, rates: Path) -> None:
    """Before their statistics are known, and after."""
    plain, normalised = recipe_of(images, root), recipe_of(images, root, "train.normalise=channel")
    for stages in ((), ("shard", "encode")):
        perform(normalised, root, *stages)
        assert planned(normalised, root, rates).lines == planned(plain, root, rates).lines


def test_held_out_images_are_encoded_and_passed_through_the_model(images: Path, root: Path, rates: Path) -> None:
    held_out = write_images(root.parent / "held_out", count=2)
    more = ("train.held_out={every: 3, images: 5}", "train.steps=7", f"archive.held_out={held_out}")
    recipe = recipe_of(images, root, *more)
    lines = {line.stage: line for line in planned(recipe, root, rates).lines}
    assert list(lines) == ["shard", "encode", "encode held_out", "train", "sample", "evaluate"]
    assert lines["encode held_out"].images == 6
    work = cost(recipe.train.model.config(_given()))
    passes = 3 * 5 * 4 * 2  # after the steps 3, 6 and 7, at four levels, of the EMA and of the weights
    assert lines["train"].hours * 3600 == pytest.approx((7 * 4 * 6 + passes * 2) * work.macs / 1e9)
    shards, latents = perform(recipe, root, "shard", "encode")
    encoding = recipe.encoding_held_out(latents, str(root), force=False)
    assert encoding is not None
    out = STAGES["encode"].output(str(root), encoding.encode, shards)
    made = STAGES["encode"].run(encoding.encode, shards, out=out, tracker=NullTracker())
    assert lines["encode held_out"].objects == len(made.files) + 1
    assert lines["encode held_out"].size == sum(entry.size for entry in made.files if "/c/" in entry.path)
    states = {line.stage: line.state for line in planned(recipe, root, rates).lines}
    assert (states["encode held_out"], states["train"]) == ("done", "to do")
    stage = STAGES["train"]
    stage.run(recipe.train, latents, out=stage.output(str(root), recipe.train, latents), tracker=NullTracker())
    lines = {line.stage: line for line in planned(recipe, root, rates).lines}
    assert "encode held_out" not in lines  # nobody will measure
    assert recipe.encoding_held_out(latents, str(root), force=True) is not None


def test_the_archive_is_accounted_for(
    capsys: pytest.CaptureFixture[str], images: Path, root: Path, rates: Path, prefect_api: str
) -> None:
    (images / "README.md").write_bytes(b"")
    said = [
        ("train", "24 images, 3 classes: class0, class1, class2"),
        ("", "passed over: 1 file of no class (first: README.md)"),
    ]
    assert planned(recipe_of(images, root), root, rates).archive == tuple(said)
    for command in (["plan", "demo", "--rates", str(rates)], ["shard", "demo"]):
        assert main([*command, *tiny(images, root)]) == 0
        out = capsys.readouterr().out
        assert all(f"{name:5}  {line}" in out for name, line in said)


def _given(*, learn_variance: bool = True) -> DataSpec:
    return DataSpec(channels=4, side=SIDE // 4, num_classes=3, learn_variance=learn_variance)


def test_objects_and_bytes_are_those_that_the_stages_write(images: Path, root: Path, rates: Path) -> None:
    recipe = recipe_of(images, root)
    before = {line.stage: line for line in planned(recipe, root, rates).lines}
    for manifest in perform(recipe, root, "shard", "encode", "train", "sample"):
        line = before[manifest.stage]
        if manifest.stage != "train":  # whose checkpoints are no part of the manifest
            assert line.objects == len(manifest.files) + 1
        big = [
            entry for entry in manifest.files if entry.path.startswith(("train/", "data/")) and "json" not in entry.path
        ]
        slack = 10_240 * len(big) if manifest.stage == "shard" else 0  # tars end in zeros
        if manifest.stage != "train":
            assert line.size <= sum(entry.size for entry in big) <= line.size + slack
        line = next(line for line in planned(recipe, root, rates).lines if line.stage == manifest.stage)
        assert (line.state, line.missing, line.hours) == ("done", 0, 0)


def test_what_is_there_is_not_done_again(images: Path, root: Path, rates: Path) -> None:
    recipe = recipe_of(images, root)
    whole = planned(recipe, root, rates).lines[1]
    (shards,) = perform(recipe, root, "shard")
    out = STAGES["encode"].output(str(root), recipe.encode, shards)
    STAGES["encode"].run(recipe.encode, shards, out=out, tracker=NullTracker())
    Path(out.uri, "manifest.json").unlink()
    Path(out.uri, "records", "rows-00001.json").unlink()
    line = planned(recipe, root, rates).lines[1]
    assert line.state == "2 of 3 units"
    assert line.hours == pytest.approx(whole.hours / 3)
    assert line.missing == pytest.approx(whole.size / 3, abs=1)


def test_parts_take_their_share_of_the_memory(images: Path, root: Path, rates: Path) -> None:
    def memory(*more: str) -> int:
        return planned(recipe_of(images, root, "train.batch_size=4", *more), root, rates).memory

    held = sum(cost(recipe_of(images, root).train.model.config(_given())).memory.values())
    gradients = cost(recipe_of(images, root).train.model.config(_given())).memory["gradients"]
    copies = memory("launch.nproc=4")
    assert copies - memory("launch.nproc=4", "train.parallel=fsdp") == held - held // 4
    summed = memory("launch.nproc=2", "train.parallel=fsdp", "train.micro_batch=1")
    assert summed - memory("launch.nproc=4", "train.parallel=fsdp") == (held + gradients) // 2 - held // 4
    nodes = "launch={kind: nodes, nodes: 2, nproc: 2, address: 'a:1'}"
    assert copies - memory(nodes, "train.parallel=hsdp") == held - held // 2


def test_every_average_takes_its_memory_and_its_disk(images: Path, root: Path, rates: Path) -> None:
    many = ["train.steps=5", "train.checkpoint_every=1"]
    plain, more = (
        planned(recipe_of(images, root, *many, *further), root, rates)
        for further in ([], ["train.ema_decays=[0.9]", "train.ema_power=[0.05]"])
    )
    held = cost(recipe_of(images, root).train.model.config(_given())).memory
    assert more.memory - plain.memory == 2 * held["ema"]
    saved = held["ema"] * recipe_of(images, root).train.keep_checkpoints + held["weights"]
    assert more.lines[2].size - plain.lines[2].size == 2 * saved
    assert more.lines[2].objects - plain.lines[2].objects == 2
    short = planned(recipe_of(images, root, "train.steps=5", "train.checkpoint_every=5"), root, rates)
    kept = planned(recipe_of(images, root, *many, "train.milestones=2"), root, rates)
    assert (short.lines[2].objects, plain.lines[2].objects, kept.lines[2].objects) == (7, 9, 19)
    assert short.lines[2].size < plain.lines[2].size < kept.lines[2].size


def test_evaluations_of_milestones_are_counted(images: Path, root: Path, rates: Path) -> None:
    kept = ["train.steps=5", "train.milestones=2"]
    asked = [*kept, "evaluate_milestones.sample.count=4"]
    plain = planned(recipe_of(images, root, *kept), root, rates)
    recipe = recipe_of(images, root, *asked)
    found = planned(recipe, root, rates)
    assert found.lines[:3] == plain.lines[:3]
    names = ["shard", "encode", "train", "sample x 3", "evaluate x 3", "sample", "evaluate"]
    assert [line.stage for line in found.lines] == names
    *_, samples, metrics, _, evaluate = found.lines
    alone = planned(recipe_of(images, root, "sample.count=4"), root, rates).lines[3]
    assert (samples.images, samples.objects, samples.size) == (12, 3 * alone.objects, 3 * alone.size)
    assert samples.hours == pytest.approx(3 * alone.hours)
    once = 24 / 50 + 24 / 20  # the training images are measured once
    assert metrics.hours * 3600 == pytest.approx(once + 3 * (2 * 4 / 20 + (24 * 24 + 4 * 4 + 24 * 4) / 10_000))
    assert evaluate.hours * 3600 == pytest.approx(2 * 6 / 20 + (24 * 24 + 6 * 6 + 24 * 6) / 10_000)
    assert found.disk == plain.disk + samples.size + metrics.size

    _, latents, last = perform(recipe, root, "shard", "encode", "train")  # commits the milestones 2 and 4
    over = recipe.over_training
    assert over is not None
    source: Manifest = over.checkpoints(str(root), latents)[2]
    for name, config in (("sample", over.sample), ("evaluate", over.evaluate)):
        out = STAGES[name].output(str(root), config, source)
        source = STAGES[name].run(config, source, out=out, tracker=NullTracker())
    states = {line.stage: line.state for line in planned(recipe, root, rates).lines}
    assert (states["sample x 3"], states["evaluate x 3"]) == ("1 of 3 units", "1 of 3 units")
    assert recipe.evaluations(str(root), [latents, last]) == {2: source, 4: None, 5: None}
    later = recipe_of(images, root, *asked, "train.milestones=[1, 2, 3]")  # training has not kept 1 and 3
    assert planned(later, root, rates).lines[3].stage == "sample x 2"


def test_micro_batches_and_recomputed_blocks_keep_less(images: Path, root: Path, rates: Path) -> None:
    def kept(*more: str) -> int:
        recipe = recipe_of(images, root, "train.batch_size=6", *more)
        return planned(recipe, root, rates).memory - sum(cost(recipe.train.model.config(_given())).memory.values())

    assert 2.9 < kept() / kept("train.micro_batch=2") < 3.1
    assert kept("train.checkpoint_activations=true") < kept() / 2


def test_what_is_not_trained_has_no_gradients_moments_and_averages(images: Path, root: Path, rates: Path) -> None:
    """Nor are the inputs of a frozen layer kept for its gradient."""

    def memory(*more: str) -> int:
        return planned(recipe_of(images, root, "train.batch_size=4", *more), root, rates).memory

    *_, trained = perform(recipe_of(images, root), root, "shard", "encode", "train")
    model = build(recipe_of(images, root).train.model.config(_given()))
    tokens, width = 4 * model.get_parameter("pos_embed").shape[1], model.get_parameter("pos_embed").shape[2]
    hidden = len(model.get_parameter("blocks.0.mlp.fc1.weight"))
    frozen = memory("train.freeze=[blocks.0.mlp.*]")
    assert memory() - frozen == 16 * (2 * hidden * width + hidden + width) + 4 * tokens * (width + hidden)

    few = memory("train.freeze=['*', '!y_embedder.*']")
    lora = ("train.lora={rank: 2, targets: [blocks.0.mlp.fc1]}", f"train.init.source={trained.url}")
    adapted = memory(*lora, "train.freeze=['!y_embedder.*']")
    assert adapted - few == 20 * 2 * (width + hidden) + 4 * tokens * (width + 2)


def test_the_dispersive_loss_takes_memory_and_in_micro_batches_a_pass(images: Path, root: Path, rates: Path) -> None:
    def train_of(*more: str) -> tuple[int, float]:
        found = planned(recipe_of(images, root, "train.batch_size=6", *more), root, rates)
        return found.memory, found.lines[2].hours

    config = recipe_of(images, root).train.model.config(_given())
    memory, hours = train_of()
    with_it, as_long = train_of("train.dispersive={block: 1}")
    assert with_it - memory == 3 * 4 * 6 * config.tokens * config.width
    assert as_long == hours
    _, longer = train_of("train.dispersive={block: 1}", "train.micro_batch=2")
    assert longer == pytest.approx(4 / 3 * hours)


def test_what_does_not_fit_is_refused_with_what_to_change(
    capsys: pytest.CaptureFixture[str],
    images: Path,
    root: Path,
    rates: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["plan", "demo", "--rates", str(rates), *tiny(images, root)]
    assert main(arguments) == 0
    assert "disk" in capsys.readouterr().out
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
        said = refused(capsys, arguments)
        assert f"error: {root}: 0.0 GB to write, 0.0 GB are free; name a larger --root, or encode.flips" in said
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: namedtuple("memory", "total")(1 << 20))
        assert "train: needs" in refused(capsys, arguments)
    assert "is not a multiple of the 3 ranks" in refused(capsys, [*arguments, "--set", "launch.nproc=3"])
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The URL of an empty root that is not on this machine's disks."""
    yield "memory://planned"
    fs = fsspec.filesystem("memory")
    fs.rm("/planned", recursive=True) if fs.exists("/planned") else None


def test_latents_of_a_root_elsewhere_need_room_in_the_cache(
    capsys: pytest.CaptureFixture[str],
    images: Path,
    root: Path,
    elsewhere: str,
    rates: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = recipe_of(images, elsewhere)
    assert planned(recipe, root, rates).copy is None
    copy = planned(recipe, elsewhere, rates).copy
    assert copy is not None
    assert copy.folder == str(tmp_path / "cache/ditflow")
    usage = namedtuple("usage", "total used free")
    arguments = ["plan", "demo", "--rates", str(rates), *tiny(images, elsewhere)]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 10))
        said = refused(capsys, arguments)
        assert f"error: {copy.folder}: 0.0 GB of latents to copy here for training, 0.0 GB are free; set XDG_" in said
        streamed = ["--set", "train.order=pooled", "--set", "train.reading=streamed"]
        assert main([*arguments, *streamed]) == 0
        assert "to copy" not in capsys.readouterr().out
    assert main(arguments) == 0
    assert f"GB of latents to copy to {copy.folder}, " in capsys.readouterr().out

    _, latents = perform(recipe, elsewhere, "shard", "encode")
    assert planned(recipe, elsewhere, rates).copy.size == copy.size
    RowReader(latents)
    files = list((tmp_path / "cache/ditflow/staged").rglob("*.rows"))
    assert sum(path.stat().st_size for path in files) == copy.size
    assert planned(recipe, elsewhere, rates).copy.size == 0
    perform(recipe, elsewhere, "shard", "encode", "train")
    assert planned(recipe, elsewhere, rates).copy is None


def test_faults_of_late_stages_show_before_the_first(
    capsys: pytest.CaptureFixture[str],
    images: Path,
    root: Path,
    rates: Path,
) -> None:
    arguments = ["plan", "demo", "--rates", str(rates), *tiny(images, root)]
    assert "nowhere" in refused(capsys, [*arguments, "--set", "archive.train=/nowhere"])
    assert "does not fit the latents" in refused(capsys, [*arguments, "--set", "train.model.patch_size=3"])
    without = [*arguments[:2], *arguments[4:], "--set", "evaluate.extractor.weights=/nowhere"]
    assert "/nowhere" in refused(capsys, without)
    for text in ("shard: fast", "speed: 1", "[", "train: 0"):
        rates.write_text(text)
        assert f"--rates {rates}: " in refused(capsys, arguments)


def test_rates_that_are_not_given_are_measured(images: Path, root: Path) -> None:
    found = plan(recipe_of(images, root), str(root), read_rates(None)).rates
    assert set(found) == set(yaml.safe_load(RATES))
    assert all(rate > 0 for rate in found.values())
    with pytest.raises(InputError, match="cannot be read"):
        read_rates("nowhere.yaml")
