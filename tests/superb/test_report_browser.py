"""A suite's report in a real browser: what a reader sees, from disk and without a network."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from armhubert.superb import report
from armhubert.superb.suite import COLUMNS, MINI_COLUMNS, SuiteFinished
from armhubert.superb.task import Task
from armhubert.superb.tasks import MINI, TASKS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = "<img src=x onerror=document.title='owned'>"
MODELS = ("fbank", "arm-student", f"</title><script>document.title='owned'</script>{HOSTILE}$\\frac{'x' * 60}")
WIDTHS = {"desktop": (1280, 900), "phone": (400, 800)}


def fake_result(task: Task, model: str, seed: int) -> dict[str, Any]:
    """What a run leaves in result.json, with labels and keys that a stranger chose."""
    draw = random.Random(f"{task.name} {seed}")
    metrics = {metric.name: draw.uniform(3, 40) if metric.unit else draw.uniform(0.01, 0.5) for metric in task.metrics}
    steps = task.defaults.steps
    classes = [HOSTILE, "$x_1$", *(f"word {number}" for number in range(8))]
    tests = {"test": metrics} | ({"test:timit": metrics} if task.name == "pr" else {})
    history = [{"kind": "train", "step": n, "loss": 3 / n} for n in range(1, 40)]
    history += [{"kind": "dev", "step": n, **metrics} for n in range(10, 40, 10)]
    trials = {"scores": [draw.gauss(n % 2, 0.6) for n in range(200)], "targets": [n % 2 == 1 for n in range(200)]}
    counts = [[draw.randrange(20) for _ in classes] for _ in classes]
    details = {
        "confusion": {"labels": classes, "counts": counts} if task.name in ("ks", "er") else None,
        "by_label": {label: [draw.randrange(10), 10] for label in classes} if task.name in ("pr", "mini-pr") else {},
        "detection": trials if task.name == "asv" else None,
        "examples": [[f"k-{HOSTILE}", "A B" * 60, HOSTILE]],
    }
    result = {
        "task": task.name, "metrics": metrics, "dev": metrics, "tests": tests, "changed": {"steps": 40},
        "model": {
            "source": f"/data/{model}", "identity": "0123456789abcdef" * 2, "parameters": 22_015_552,
            "features": "hidden", "layers": 13, "width": 480,
        },
        "training": {"learning_rate": 1e-4, "steps": steps}, "config": {"seed": 0}, "config_hash": "f" * 32,
        "data": {name: {"items": 100, "seconds": 3600.0, "hash": "0" * 32} for name in ("train", "dev", "test")},
        "notes": [f"one note of {HOSTILE} {'long ' * 40}", "unbroken" * 60], "details": details, "wall_seconds": 123.4,
        "versions": {"armhubert": "0.1.0", "torch": "2.12.1"}, "hardware": {"device": "CPU Some Processor, 2 threads"},
    }  # fmt: skip
    if steps:
        weights = [draw.random() for _ in range(13)]
        trained = {"best_step": 20, "history": history, "layer_weights": [weight / sum(weights) for weight in weights]}
        result |= trained
    return result


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """A suite of everything, and one of the proxy."""
    written = {}
    for name, tasks, columns in (("superb", TASKS, COLUMNS), ("mini", MINI, MINI_COLUMNS)):
        out = tmp_path_factory.mktemp(name)
        results = {
            model: {task.name: fake_result(task, model, seed) for task in tasks.values()}
            for seed, model in enumerate(MODELS)
        }
        written[name] = report.write_report(SuiteFinished(results, columns, "done", out))
    return written


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(params=[(name, size) for name in ("superb", "mini") for size in WIDTHS], ids="-".join)
def page(request, browser, reports) -> Iterator[Any]:
    """A report opened from disk; whatever it complains of or asks for is in `page.heard`."""
    name, size = request.param
    width, height = WIDTHS[size]
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    opened = context.new_page()
    opened.heard = []
    opened.on("console", lambda message: opened.heard.append(message.text))
    opened.on("pageerror", lambda error: opened.heard.append(str(error)))
    opened.on("dialog", lambda dialog: opened.heard.append("dialog"))
    url = reports[name].as_uri()
    opened.on(
        "request", lambda asked: opened.heard.append(asked.url) if not asked.url.startswith(("data:", url)) else 0
    )
    opened.goto(url)
    yield opened
    context.close()


def test_opens_from_disk_quietly_with_every_picture(page):
    assert page.heard == []
    sizes = page.eval_on_selector_all("img", "images => images.map(i => [i.complete, i.naturalWidth])")
    assert sizes
    assert all(complete and width > 0 for complete, width in sizes)


def test_tables_are_seen_and_the_page_is_as_wide_as_the_window(page):
    tables = page.locator("table")
    assert tables.count() >= 3
    assert all(tables.nth(place).is_visible() for place in range(tables.count()))
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_the_keyboard_opens_what_is_folded_and_the_contents_lead_there(page):
    assert page.eval_on_selector_all("nav a", "links => links.every(a => document.getElementById(a.hash.slice(1)))")
    folded = page.locator("details").first
    assert not folded.evaluate("one => one.open")
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert folded.evaluate("one => one.open")
    assert folded.locator("img, pre").first.is_visible()


def test_strangers_names_are_text(page):
    assert MODELS[2] in page.title()
    assert page.locator("script, [onerror]").count() == 0
    assert page.locator(".summary tbody").first.locator("th[scope=row]").all_inner_texts() == list(MODELS)
    assert page.heard == []


def test_models_are_compared(page):
    ours = page.locator(".summary tbody").first
    assert ours.locator("tr").count() == len(MODELS)
    for column in range(ours.locator("tr").first.locator("td").count()):
        best = ours.locator(f"tr td:nth-child({column + 2}).best")
        titled = page.locator(f".summary thead th:nth-child({column + 2})").inner_text()
        assert best.count() == (0 if "overall" in titled or "SUPERB" in titled else 1)
    assert page.locator(".summary .published td.best").count() == 0


def test_the_dark_page_is_dark(browser, reports):
    shades = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        opened = context.new_page()
        opened.goto(reports["mini"].as_uri())
        color = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        shades[scheme] = sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(",")))
        context.close()
    assert shades["dark"] < 150 < 700 < shades["light"]
