"""The page of `indra monitor` in a real browser, on real runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from browser import chromium, expect, page_of, served  # noqa: F401 - a fixture
from indraquantum.config import TrainSettings
from indraquantum.live.monitor import site_of
from indraquantum.metrics import FIELDS, _line, read_metrics
from indraquantum.training import loop

HOSTILE = "<img src=x onerror=document.title='run'>\"'&amp;"
TINY = {"threads": 1, "d_model": 6, "layers": 1, "heads": 2, "mlp_width": 10, "batch_tokens": 480}


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A real run with a teacher, and its logs."""
    folder = tmp_path_factory.mktemp("page")
    settings = TrainSettings(
        data=world.data, output=folder / "real", logs=folder / "logs", max_steps=45, evaluate_every=10, **TINY
    )
    return loop.train(settings)


@pytest.fixture
def logs(run, tmp_path):
    """A copy of the real run, and one with a hostile name whose metrics are damaged."""
    shutil.copytree(run.metrics.parent, tmp_path / "logs" / "real")
    hostile = tmp_path / "logs" / HOSTILE
    hostile.mkdir()
    (hostile / "metrics.jsonl").write_bytes(
        _line(dict.fromkeys(FIELDS) | {"step": 1, "loss": 2.0, "held_out": {HOSTILE: 1.0, "all": 1.0}})
        + b"{nothing\n"
        + _line(dict.fromkeys(FIELDS) | {"step": 2, "loss": 1.0, "context_divergence": 1.0, "collapse": [HOSTILE]})
    )
    (hostile / "run.json").write_text(json.dumps({"settings": {"strategy": HOSTILE, "seed": HOSTILE}}))
    return tmp_path / "logs"


def choose(page, name: str) -> None:
    page.get_by_role("checkbox", name=name, exact=True).click()


def summary(page, chart: str):
    return page.locator(f"#chart-{chart} .summary")


def wait_for(page, chart: str, text: str) -> None:
    summary(page, chart).filter(has_text=text).wait_for()


def test_each_view_of_a_real_run_beside_a_hostile_one(chromium, run, logs):  # noqa: F811
    metrics = read_metrics(run.metrics)
    last = metrics[-1]
    with served(site_of(logs)) as server, page_of(chromium, server.url) as page:
        page.locator("#runs tbody tr").nth(1).wait_for()
        for box in page.locator("#runs input:checked").all():
            box.click()
        choose(page, "real")
        wait_for(page, "weights", f"KD {last['kd_weight']:.4f} at step 45")
        wait_for(page, "loss", f"held-out CE, all {last['held_out']['all']:.4f} at step 45")
        wait_for(page, "circular", f"circular variance {last['phase_circular_variance']:.4f} at step 45")
        probe = next(found for found in reversed(metrics) if found["context_divergence"] is not None)
        wait_for(page, "rank", f"{probe['effective_rank']:.4f} at step {probe['step']}")
        expect(page.locator("figure canvas")).to_have_count(14)
        # The keyboard reads a chart, and the same figures are there as a table.
        page.locator("#chart-weights").focus()
        for key in ("End", "ArrowLeft"):
            page.keyboard.press(key)
        expect(page.locator("#reading")).to_contain_text(f"step 44: KD {metrics[44]['kd_weight']:.4f}")
        page.locator("#chart-weights summary").click()
        row = page.locator("#chart-weights details tbody tr").last.locator("td")
        expect(row.first).to_have_text("45")
        expect(row.nth(1)).to_have_text(f"{last['kd_weight']:.4f}")
        # A range of steps, by numbers.
        page.get_by_label("first step").fill("20")
        page.keyboard.press("Tab")
        page.get_by_role("tab", name="Comparison").click()
        page.get_by_text("Choose two or more runs").wait_for()
        choose(page, HOSTILE)
        page.get_by_role("rowheader", name="--seed").wait_for()
        page.get_by_role("tab", name="Comparison").focus()
        page.keyboard.press("ArrowRight")
        page.get_by_role("cell", name="checkpoint_v4_epoch_1.pt").wait_for()
        page.get_by_role("tab", name="Curves").click()
        page.get_by_text("1 damaged line is left out").wait_for()
        page.get_by_text("suspected collapse").first.wait_for()
        expect(page.locator("#runs")).to_contain_text(HOSTILE)
        assert page.title() == "IndraQuantum monitor"  # nothing of a name was executed
        assert page.locator("img").count() == 0


def test_a_run_that_grows_in_two_tabs_and_a_server_that_is_gone_for_a_while(chromium, logs):  # noqa: F811
    with served(site_of(logs)) as server:
        with page_of(chromium, server.url) as page, page_of(chromium, server.url, width=360, scheme="dark") as other:
            for tab in (page, other):
                tab.locator("#runs tbody tr").nth(1).wait_for()
                tab.get_by_role("checkbox", name="real", exact=True).check()
            with (logs / "real" / "metrics.jsonl").open("ab") as file:
                file.write(_line(dict.fromkeys(FIELDS) | {"step": 46, "loss": 1.0, "kd_weight": 0.7654}))
            for tab in (page, other):
                wait_for(tab, "weights", "0.7654 at step 46")
                assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        context = chromium.new_context()
        tab = context.new_page()
        tab.goto(server.url)
        tab.locator("#runs tbody tr").first.wait_for()
        context.set_offline(True)
        tab.get_by_text("The monitor does not answer").wait_for()
        context.set_offline(False)
        tab.get_by_text("The monitor does not answer").wait_for(state="hidden")
        context.close()


def with_both_runs(browser, server):
    """Return a page of its own context, closed by the caller, on which both runs are chosen."""
    context = browser.new_context()
    context.set_default_timeout(60_000)
    page = context.new_page()
    page.goto(server.url)
    page.locator("#runs tbody tr").nth(1).wait_for()
    for name in ("real", HOSTILE):
        page.get_by_role("checkbox", name=name, exact=True).check()
    return page


def test_an_error_of_one_run_is_shown_and_goes_away(chromium, logs):  # noqa: F811
    def failing(route):
        route.fulfill(status=500, body=json.dumps({"error": "a file can't be read: no such disk"}))

    with served(site_of(logs)) as server:
        page = with_both_runs(chromium, server)
        problem = page.get_by_text("a file can't be read: no such disk").first
        for tab, path, found in (
            ("Curves", "curves", page.locator("#chart-loss canvas")),
            ("Comparison", "differences", page.get_by_role("rowheader", name="--seed")),
            ("Checkpoints and samples", "details", page.get_by_role("cell", name="checkpoint_v4_epoch_1.pt")),
        ):
            page.get_by_role("tab", name=tab).click()
            found.wait_for()
            page.route(f"**/api/{path}?*", failing)
            problem.wait_for()
            expect(page.locator("#connection")).to_have_text("")
            page.unroute(f"**/api/{path}?*")
            problem.wait_for(state="hidden")
            found.wait_for()
        page.get_by_role("tab", name="Comparison").click()
        page.get_by_role("rowheader", name="--seed").wait_for()
        shutil.rmtree(logs / HOSTILE)
        page.get_by_text("Choose two or more runs").wait_for()
        page.context.close()


def test_a_removed_run_leaves_the_page_and_an_error_of_the_list_is_told(chromium, logs):  # noqa: F811
    with served(site_of(logs)) as server:
        page = with_both_runs(chromium, server)
        wait_for(page, "loss", HOSTILE)
        expect(page).to_have_url(re.compile(r"runs=[0-9a-f]{16},[0-9a-f]{16}$"))
        shutil.rmtree(logs / HOSTILE)
        expect(summary(page, "loss")).not_to_contain_text(HOSTILE)
        expect(summary(page, "loss")).to_contain_text("total loss")
        expect(page).to_have_url(re.compile(r"runs=[0-9a-f]{16}$"))
        away = logs.rename(logs.with_name("away"))  # for a moment, as a network folder may be
        page.get_by_text("There is no run below this folder yet").wait_for()
        expect(summary(page, "loss")).not_to_contain_text("total loss")
        away.rename(logs)
        expect(summary(page, "loss")).to_contain_text("total loss")
        expect(page).to_have_url(re.compile(r"runs=[0-9a-f]{16}$"))
        problem = json.dumps({"error": "a file can't be read: no such disk"})
        page.route("**/api/runs", lambda route: route.fulfill(status=500, body=problem))
        expect(page.locator("#connection")).to_have_text("a file can't be read: no such disk")
        page.unroute("**/api/runs")
        expect(page.locator("#connection")).to_have_text("")
        page.context.close()


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_followed(chromium, world, tmp_path):  # noqa: F811
    logs = tmp_path / "logs"
    command = [
        sys.executable, "-m", "indraquantum", "train", "--data", world.data, "--output", tmp_path / "live",
        "--logs", logs, "--no-teacher", "--epochs", 400, "--save-every", 10, "--evaluate-every", 20,
        *(part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", value)),
    ]  # fmt: skip

    def start():
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    with served(site_of(logs)) as server, page_of(chromium, server.url) as page:
        page.get_by_text("There is no run below this folder yet").wait_for()
        training = start()
        try:
            page.locator(".running").wait_for()
            page.locator("#chart-loss canvas").wait_for()
            steps = page.locator("#runs tbody td").nth(2)
            before = int(steps.inner_text().split()[0].replace(",", ""))
            time.sleep(3)
            assert int(steps.inner_text().split()[0].replace(",", "")) > before
            os.kill(training.pid, signal.SIGKILL)
            training.wait()
            page.locator(".died").wait_for()
            training = start()
            page.locator(".running").wait_for()
            training.send_signal(signal.SIGTERM)
            training.wait()
            page.locator(".stopped").wait_for()
            last = read_metrics(logs / "live" / "metrics.jsonl")[-1]
            page.locator("#chart-rate .summary").filter(has_text=f"at step {last['step']:,}").wait_for()
        finally:
            training.kill()
            training.wait()
