"""The pictures in docs/screens: the demo and its evaluations as Prefect, MLflow and the report show them.

``make screens`` runs the demo with the servers of ``ditflow up``, evaluates its model for some weeks, and takes the
pictures in a headless Chromium. What the root has already is not made again, and no pictures are compared by anything.
"""

import io
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

from mlflow import MlflowClient
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from flows import servers
from flows.children import child

PICTURES: Final = Path(__file__).parents[1] / "screens"
DITFLOW: Final = Path(sys.executable).with_name("ditflow")
MODEL: Final = "ditflow-demo"
WEEKS: Final = 4
MINUTE: Final = 60_000
STILL: Final = 3_000
"""Milliseconds without any change, after which a page is drawn: canvases have no event for that."""


def main() -> None:
    """Make what the pictures show, and take them."""
    parser = ArgumentParser(prog="make screens", description=__doc__)
    parser.add_argument("--root", default="/tmp/ditflow/runs", help="outputs; some pictures show it")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser (default: from PATH)")
    options = parser.parse_args()
    root = Path(options.root).absolute()
    PICTURES.mkdir(exist_ok=True)
    with _up(root) as note:
        subprocess.run([DITFLOW, "demo", "--root", root], check=True)
        flow_run = _evaluated()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1120}, timezone_id="UTC")
            page.set_default_timeout(5 * MINUTE)
            page.add_init_script("localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = true")
            _prefect(page, note, flow_run)
            _mlflow(page, f"{note['mlflow']}/#", MlflowClient(note["mlflow"]))
            _report(page, root)
            browser.close()


@contextmanager
def _up(root: Path) -> Iterator[Mapping[str, str]]:
    """The servers of a root and a worker, which this process uses, too."""
    root.mkdir(parents=True, exist_ok=True)
    ports = ("--prefect-port", str(servers.free_port()), "--mlflow-port", str(servers.free_port()))
    command = [str(DITFLOW), "up", "--root", str(root), *ports]
    with (root / "up.log").open("wb") as log, child(command, output=log) as process:
        _until(lambda: servers.running(str(root)) or process.poll() is not None)
        if not servers.use_running(str(root)):
            sys.exit(f"{root}: `ditflow up` has ended; see {log.name}")
        yield servers.running(str(root)) or {}


def _evaluated() -> UUID:
    """Evaluate the model for the last weeks, one after the other; the flow run of the demo's pipeline."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    today = datetime.now(UTC).date()
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("reevaluate/reevaluate")
        for week in reversed(range(WEEKS)):
            asked = {"model_name": MODEL, "on": (today - timedelta(weeks=week)).isoformat()}
            run = client.create_flow_run_from_deployment(deployment.id, parameters=asked).id
            _until(lambda run=run: client.read_flow_run(run).state.is_final())
            if (state := client.read_flow_run(run).state).name not in ("Completed", "Skipped"):
                sys.exit(f"reevaluate {asked['on']}: {state.name}: {state.message}")
        pipeline = FlowFilter(name=FlowFilterName(any_=["pipeline"]))
        first = client.read_flow_runs(flow_filter=pipeline, sort=FlowRunSort.START_TIME_ASC, limit=1)
    return first[0].id


def _prefect(page: Page, note: Mapping[str, str], flow_run: UUID) -> None:
    page.goto(f"{note['prefect']}/v2/login")
    page.get_by_placeholder("admin:pass").fill(note["password"])
    page.get_by_role("button", name="Login").click()
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("link", name="demo", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    page.get_by_role("button", name="Add item").click()
    page.get_by_role("textbox").nth(2).fill("train.steps=2000")
    _take(page, "form", bottom=796)
    page.goto(f"{note['prefect']}/v2/runs/flow-run/{flow_run}")
    page.get_by_text("Finished in state Completed()").wait_for()
    _take(page, "graph", bottom=514)


def _mlflow(page: Page, address: str, client: MlflowClient) -> None:
    view, experiment = "workflowType=machine_learning", client.get_experiment_by_name("ditflow").experiment_id
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment])}
    train = next(runs[name] for name in runs if name.startswith("demo-") and name.endswith(" train"))
    page.goto(f"{address}/experiments/{experiment}/runs/{train}/model-metrics?{view}")
    _curves(page, "^(loss|gradient)")
    _take(page, "train", bottom=980)
    page.goto(f"{address}/experiments/{experiment}/runs/{runs[f'{MODEL}/1 again']}/model-metrics?{view}")
    page.get_by_role("button", name="Configure charts").click()
    page.get_by_text("Time (wall)").click()
    page.keyboard.press("Escape")
    _curves(page, "^(fd|fd_infinity|kd|precision.*|recall.*|recognised)$")
    _take(page, "series", bottom=980)
    page.goto(f"{address}/models/{MODEL}/versions/1?{view}")
    page.get_by_text("Draws images of").wait_for()
    _take(page, "registry", bottom=980)


def _curves(page: Page, names: str) -> None:
    """Show the curves of these metrics, without the tools that a browser with a mouse shows below it alone."""
    page.get_by_placeholder("Search metric charts").fill(names)
    page.locator(".modebar-container").nth(5).wait_for(state="attached")
    page.add_style_tag(content=".modebar-container { display: none }")


def _report(page: Page, root: Path) -> None:
    page.goto(max(root.glob("reports/*/report.html"), key=lambda path: path.stat().st_mtime).as_uri())
    _take(page, "report", bottom=925, left=130, right=1150)


def _take(page: Page, name: str, *, bottom: int, left: int = 0, right: int = 1280) -> None:
    """Keep what a page shows once it stands still, as a PNG of few colours."""
    page.mouse.move(0, 0)
    seen, now = b"", page.screenshot()
    while seen != now:
        page.wait_for_timeout(STILL)
        seen, now = now, page.screenshot()
    picture = Image.open(io.BytesIO(now)).convert("RGB").crop((left, 0, right, bottom))
    few = picture.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)  # keeps rare colours, too
    few.save(PICTURES / f"{name}.png", optimize=True)


def _until(holds: Callable[[], object]) -> None:
    while not holds():
        time.sleep(0.5)


if __name__ == "__main__":
    main()
