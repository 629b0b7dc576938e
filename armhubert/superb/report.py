"""One HTML page for a suite: tables, pictures inline, nothing loaded from anywhere; every value escaped."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from armhubert.files import write_atomic
from armhubert.superb import pictures
from armhubert.superb.suite import (
    COLUMNS,
    MINI_NOTE,
    PUBLISHED,
    Column,
    Row,
    SuiteFinished,
    overall,
    printed,
    row_of,
    superb_score,
)
from armhubert.superb.task import Metric, Task
from armhubert.superb.tasks import TASKS, find

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]

_ARROWS = {True: "↑", False: "↓", None: ""}

_STYLE = """
:root{color-scheme:light dark;--text:#1d2433;--dim:#5b6475;--line:#d9dee7;--page:#fff;--card:#f6f8fb;--link:#1a5fb4;
--best:#0b6b3a;--best-back:#e3f4ea}
@media(prefers-color-scheme:dark){:root{--text:#e4e8ef;--dim:#9aa4b5;--line:#343c4a;--page:#14181f;--card:#1c222c;
--link:#7db4ff;--best:#7fe0a8;--best-back:#16331f}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,sans-serif;margin:0 auto;max-width:80rem;padding:1.5rem 1rem 4rem;color:var(--text);
background:var(--page);overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.25rem;margin:2.8rem 0 .4rem;scroll-margin-top:1rem}
a{color:var(--link)}nav{margin:1rem 0 0;padding:.6rem .9rem;background:var(--card);border-radius:.5rem}
nav a{display:inline-block;margin-right:1.1rem;white-space:nowrap}
.dim,.note,caption,figcaption{color:var(--dim)}.note{font-size:.92rem;margin:.5rem 0}ul.note{padding-left:1.2rem}
.scroll{overflow-x:auto;margin:.8rem 0;border:1px solid var(--line);border-radius:.5rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .65rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody:last-child tr:last-child>*{border-bottom:0}thead th{font-weight:600;background:var(--card)}
th:first-child,td.text{text-align:left}tbody th{font-weight:500}tbody th[scope=row]{white-space:normal;min-width:8.5rem}
.summary th,.summary td{padding:.35rem .5rem}.summary tbody th[scope=row]{min-width:9.5rem}
.summary th:first-child{position:sticky;left:0;background:var(--page)}
.summary thead th:first-child{background:var(--card)}
td.best{font-weight:700;color:var(--best);background:var(--best-back)}
.published td,.published th[scope=row]{color:var(--dim);background:var(--card)}
tr.group th{text-align:left;font-size:.85rem;font-weight:600;color:var(--dim);background:var(--card)}
td.text{white-space:normal;min-width:12rem}
.figures{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}
figure{margin:.4rem 0;max-width:100%;flex:0 1 38rem}figure.wide{flex-basis:100%}
img{display:block;max-width:100%;height:auto;background:#fff;border-radius:.5rem;border:1px solid var(--line)}
figcaption{font-size:.88rem;margin-top:.25rem}
details{margin:.5rem 0;border:1px solid var(--line);border-radius:.5rem;padding:.45rem .8rem}
summary{cursor:pointer}pre{font-size:.82rem;white-space:pre-wrap;margin:.5rem 0}
"""


def write_report(finished: SuiteFinished) -> Path:
    """report.html in the suite's folder, with suite.json beside it: the same numbers for programs."""
    table = [
        {"model": name, **_named(row_of(results, finished.columns), finished.columns), **_scores(results, finished)}
        for name, results in finished.results.items()
    ]
    write_atomic(finished.out / "suite.json", json.dumps(table, indent=1) + "\n")
    path = finished.out / "report.html"
    write_atomic(path, page(finished.results, finished.columns))
    return path


def write_pictures(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Every picture of one result, as PNG in its folder."""
    paths = []
    for name, picture in pictures.draw(result).items():
        write_atomic(out / f"{name}.png", picture)
        paths.append(out / f"{name}.png")
    return paths


def _named(row: Sequence[float | None], columns: Sequence[Column]) -> dict[str, float | None]:
    return {column.title: value for column, value in zip(columns, row, strict=True)}


def _scores(results: Mapping[str, Mapping[str, Any]], finished: SuiteFinished) -> dict[str, float | None]:
    if finished.columns != COLUMNS:
        return {}
    row = row_of(results)
    return {"overall": overall(row), "SUPERB_s": superb_score(row)}


def page(results: Results, columns: Sequence[Column]) -> str:
    """The page."""
    tasks = list(dict.fromkeys(task for by_task in results.values() for task in by_task))
    title = "SUPERB" if columns == COLUMNS else "Proxy on the bundled speech"
    links = [("summary", "Summary"), *((task, find(task).title) for task in tasks), ("conditions", "Conditions")]
    parts = [
        f"<h1>{title}</h1><p class=dim>{escape(', '.join(results))}</p>",
        f"<nav>{''.join(f'<a href=#{name}>{escape(text)}</a> ' for name, text in links)}</nav>",
        summary(results, columns),
        *(_task(task, {m: by_task[task] for m, by_task in results.items() if task in by_task}) for task in tasks),
        _conditions(results),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{title}: {escape(', '.join(results))}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


# ---- tables ----------------------------------------------------------------


def summary(results: Results, columns: Sequence[Column]) -> str:
    """Our rows, and under SUPERB's the published ones."""
    superb = columns == COLUMNS
    ours = {name: row_of(by_task, columns) for name, by_task in results.items()}
    there = {task for by_task in results.values() for task in by_task}
    head = "<th>model</th>" + "".join(_heading(column, column.task in there) for column in columns)
    if superb:
        head += "<th>overall ↑</th><th>SUPERB<sub>s</sub> ↑</th>"
    best = [_best([row[place] for row in ours.values()], column) for place, column in enumerate(columns)]
    width = len(columns) + (3 if superb else 1)
    bodies = [_body(ours, columns, best, "")]
    if superb:
        label = (
            f"<tr class=group><th colspan={width}>Published, not measured here (arXiv 2305.11685, 2312.09040)</th></tr>"
        )
        bodies.append(_body(PUBLISHED, columns, [None] * len(columns), " class=published", label))
    if superb:
        notes = (
            "Bold: the best of the models measured here. ↑ higher is better, ↓ lower. Overall: mean of the 11 numbers, "
            "errors as 100 − x. SUPERB<sub>s</sub>: 0 is the leaderboard's FBANK, 1000 its best. Published rows are "
            "of heads fitted on SUPERB's whole data: compare with them only where data and settings below are SUPERB's."
        )
    else:
        notes = f"Bold: the best. {MINI_NOTE}"
    return (
        f"<h2 id=summary>Summary</h2><div class=scroll><table class=summary><thead><tr>{head}</tr></thead>"
        f"{''.join(bodies)}</table></div><p class=note>{notes}</p>"
    )


def _heading(column: Column, linked: bool) -> str:
    text = f"{escape(column.title)} {_ARROWS[column.higher_is_better]}"
    return f"<th><a href=#{column.task}>{text}</a></th>" if linked else f"<th>{text}</th>"


def _body(
    rows: Mapping[str, Row], columns: Sequence[Column], best: Sequence[float | None], kind: str, label: str = ""
) -> str:
    lines = []
    for name, row in rows.items():
        cells = [
            _cell(column.shown(value), value is not None and value == top)
            for value, column, top in zip(row, columns, best, strict=True)
        ]
        if columns == COLUMNS:
            cells += [_cell(printed(overall(row), 1)), _cell(printed(superb_score(row), 0))]
        lines.append(_row(name, cells))
    return f"<tbody{kind}>{label}{''.join(lines)}</tbody>"


def _row(name: str, cells: Iterable[str]) -> str:
    return f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>"


def _cell(text: str, best: bool = False) -> str:
    return f"<td class=best>{escape(text)}</td>" if best else f"<td>{escape(text)}</td>"


def _best(values: Sequence[float | None], column: Column | Metric) -> float | None:
    """The best of several values; None where there is nothing to choose from."""
    known = [value for value in values if value is not None]
    if len(known) < 2 or column.higher_is_better is None:
        return None
    return max(known) if column.higher_is_better else min(known)


def _digits(metric: Metric) -> int:
    return 0 if metric.higher_is_better is None else 2 if metric.unit else 4


# ---- one task --------------------------------------------------------------


def _task(name: str, by_model: Mapping[str, Mapping[str, Any]]) -> str:
    task = find(name)
    parts = [f"<h2 id={escape(name)}>{escape(task.title)}</h2>", _scores_table(task, by_model)]
    said: dict[str, list[str]] = {}  # by each line, the models of which it is true
    for model, result in by_model.items():
        data = [f"{split} {d['items']} in {d['seconds'] / 3600:.2f} h" for split, d in result["data"].items()]
        changed = ", ".join(f"{key} {value}" for key, value in result["changed"].items()) or "none"
        lines = [f"Data: {'; '.join(data)}.", f"Settings that are not {_standard(task)}: {changed}.", *result["notes"]]
        for line in dict.fromkeys(lines):
            said.setdefault(line, []).append(model)
    items = [line if len(models) == len(by_model) else f"{', '.join(models)}: {line}" for line, models in said.items()]
    parts.append(f"<ul class=note>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>")
    shown = []
    runs = pictures.each_fold(by_model)
    if trained := {m: r for m, r in runs.items() if r.get("history")}:
        shown.append(_figure(pictures.training(trained), f"{task.title}: training"))
    if weighted := {m: r for m, r in runs.items() if len(r.get("layer_weights") or ()) > 1}:
        shown.append(_figure(pictures.layer_weights(weighted), "Learned weights of the layers"))
    if detections := {m: r["details"]["detection"] for m, r in by_model.items() if r["details"]["detection"]}:
        shown.append(_figure(pictures.det(detections), "Detection error trade-off"))
    parts.append(f"<div class=figures>{''.join(shown)}</div>")
    parts += [_closer(model, result) for model, result in by_model.items()]
    return "\n".join(parts)


def _standard(task: Task) -> str:
    return "SUPERB's" if task.name in TASKS else "the proxy's own"


def _scores_table(task: Task, by_model: Mapping[str, Mapping[str, Any]]) -> str:
    """Every metric on every test set and the first on dev, and how each head was chosen."""
    first = next(iter(by_model.values()))
    metrics = [metric for metric in task.metrics if metric.name in first["metrics"]]
    tests = list(dict.fromkeys(test for result in by_model.values() for test in result["tests"]))
    columns: list[tuple[str, Metric, list[float | None]]] = []
    for test in tests:
        suffix = "" if test == "test" else f", {test.partition(':')[2]}"
        for metric in metrics:
            values = [result["tests"].get(test, {}).get(metric.name) for result in by_model.values()]
            columns.append((f"{metric.title}{suffix}", metric, values))
    columns.append(
        (f"{metrics[0].title} on dev", metrics[0], [r["dev"].get(metrics[0].name) for r in by_model.values()])
    )
    titles = [f"{title} {_ARROWS[metric.higher_is_better]}" for title, metric, _ in columns]
    head = "".join(f"<th>{escape(text)}</th>" for text in ["model", *titles, "best step", "rate", "minutes"])
    rows = []
    for place, (model, result) in enumerate(by_model.items()):
        cells = [
            _cell(printed(values[place], _digits(metric)), top is not None and values[place] == top)
            for _, metric, values in columns
            for top in (_best(values, metric),)
        ]
        training = result["training"]
        chosen = training["steps"] and "learning_rate" in training  # not where folds of a sweep have one each
        cells += [_cell(str(result["best_step"]) if "best_step" in result else "–")]
        cells += [_cell(f"{training['learning_rate']:g}" if chosen else "–")]
        cells += [_cell(printed(result["wall_seconds"] / 60, 1))]
        rows.append(_row(model, cells))
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _closer(model: str, result: Mapping[str, Any]) -> str:
    """What only one who looks closer at one model wants, folded away."""
    details = result["details"]
    parts = []
    if details["confusion"]:
        parts.append(_figure(pictures.confusion(details["confusion"]), f"{model}: confusion"))
    if details["by_label"]:
        parts.append(_figure(pictures.errors_by_label(details["by_label"]), f"{model}: errors by token", wide=True))
    if details["examples"]:
        rows = "".join(f"{key}\n  true  {truth}\n  taken {guess}\n" for key, truth, guess in details["examples"][:5])
        parts.append(f"<pre>{escape(rows)}</pre>")
    return f"<details><summary>{escape(model)}: a closer look</summary>{''.join(parts)}</details>" if parts else ""


def _figure(png: bytes, caption: str, *, wide: bool = False) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption, quote=True)
    return (
        f"<figure{' class=wide' if wide else ''}><img alt='{text}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{text}</figcaption></figure>"
    )


def _conditions(results: Results) -> str:
    rows = []
    for model, by_task in results.items():
        described: dict[str, None] = {}  # what differs between tasks has several lines
        for r in by_task.values():
            what = r["model"]
            described |= dict.fromkeys([
                what["source"],
                f"{what['parameters']:,} parameters; {what['features']} features, {what['layers']} x {what['width']}",
                f"identity {what['identity'] or 'unknown'}",
                f"{r['hardware']['device']}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}",
                f"seed {r['config']['seed']}",
            ])  # fmt: skip
        hashes = ", ".join(f"{task} {r['config_hash'][:12]}" for task, r in by_task.items())
        rows.append(_row(model, [f"<td class=text>{'<br>'.join(map(escape, [*described, hashes]))}</td>"]))
    return (
        "<h2 id=conditions>Conditions</h2><div class=scroll><table><thead><tr><th>model</th><th>what was measured, on "
        f"what, with which configurations</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
