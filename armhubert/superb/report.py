"""One HTML page for a suite: tables, pictures inline, nothing loaded from anywhere; every value escaped."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from armhubert.files import write_atomic
from armhubert.superb import pictures
from armhubert.superb.suite import COLUMNS, PUBLISHED, Column, SuiteFinished, overall, row_of, superb_score
from armhubert.superb.tasks import find

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr.published td{color:#666}td.best{font-weight:600}
figure{display:inline-block;margin:.5rem 1rem .5rem 0;vertical-align:top}img{max-width:100%}figcaption{color:#555}
.scroll{overflow-x:auto}code,pre{font-size:13px}pre{white-space:pre-wrap}h2{margin-top:2.5rem}.note{color:#555}
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
    title = "SUPERB" if columns == COLUMNS else "Proxies on the bundled speech"
    parts = [f"<h1>{title}: {escape(', '.join(results))}</h1>", summary(results, columns)]
    parts += [_task(task, {m: by_task[task] for m, by_task in results.items() if task in by_task}) for task in tasks]
    parts.append(_conditions(results))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def summary(results: Results, columns: Sequence[Column]) -> str:
    """Our rows, and under SUPERB's the published ones."""
    arrows = [f"{column.title} {'↑' if column.higher_is_better else '↓'}" for column in columns]
    superb = columns == COLUMNS
    extra = ["overall", "SUPERB<sub>s</sub>"] if superb else []
    ours = {name: row_of(by_task, columns) for name, by_task in results.items()}
    rows = []
    for kind, group in (("", ours), ("published", PUBLISHED if superb else {})):
        for name, row in group.items():
            cells = [
                f"<td class=best>{_number(value, column)}</td>"
                if kind == "" and value is not None and value == _best(ours, place, column)
                else f"<td>{_number(value, column)}</td>"
                for place, (value, column) in enumerate(zip(row, columns, strict=True))
            ]
            if superb:
                cells += [f"<td>{_plain(overall(row), 1)}</td>", f"<td>{_plain(superb_score(row), 0)}</td>"]
            rows.append(f"<tr class='{kind}'><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(text)}</th>" for text in ["model", *arrows]) + "".join(f"<th>{x}</th>" for x in extra)
    grey = (
        "<p class=note>Grey: published, by models trained and heads fitted on the full data; ours are comparable only "
        "where data and settings below are SUPERB's.</p>"
        if superb
        else "<p class=note>Proxies: a few minutes of speech, enough to rank upstreams that differ much.</p>"
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{grey}"


def _best(rows: Mapping[str, Sequence[float | None]], place: int, column: Column) -> float | None:
    values = [row[place] for row in rows.values() if row[place] is not None]
    return (max if column.higher_is_better else min)(values) if values else None  # type: ignore[type-var]


def _number(value: float | None, column: Column) -> str:
    return _plain(value, 4 if column.scale != 1 else 2)


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _task(name: str, by_model: Mapping[str, Mapping[str, Any]]) -> str:
    task, first = find(name), next(iter(by_model.values()))
    metrics = [metric for metric in task.metrics if metric.name in first["metrics"]]
    titles = ["model", *(m.title for m in metrics), f"{metrics[0].title} on dev", "best step", "rate", "minutes"]
    head = "".join(f"<th>{escape(text)}</th>" for text in titles)
    rows = []
    for model, result in by_model.items():
        values = [_plain(result["metrics"][m.name], 2 if m.unit else 4) for m in metrics]
        values += [_plain(result["dev"].get(metrics[0].name), 2 if metrics[0].unit else 4)]
        values += [str(result.get("best_step", "–")), f"{result['training']['learning_rate']:g}"]
        values += [_plain(result["wall_seconds"] / 60, 1)]
        rows.append(f"<tr><td>{escape(model)}</td>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>")
    parts = [
        f"<h2 id={escape(name)}>{escape(task.title)}</h2>",
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
    ]
    further = {m: {k: v for k, v in r["tests"].items() if k != "test"} for m, r in by_model.items()}
    for model, tests in further.items():
        for test, values_of in tests.items():
            text = ", ".join(f"{key} {value:.2f}" for key, value in values_of.items())
            parts.append(f"<p>{escape(model)}, {escape(test)}: {escape(text)}</p>")
    data = "; ".join(f"{split} {d['items']} in {d['seconds'] / 3600:.2f} h" for split, d in first["data"].items())
    changed = ", ".join(f"{key} {value}" for key, value in first["changed"].items()) or "none"
    parts.append(f"<p class=note>Data: {escape(data)}. Settings that are not SUPERB's: {escape(changed)}.</p>")
    if first["notes"]:
        parts.append("<ul class=note>" + "".join(f"<li>{escape(note)}</li>" for note in first["notes"]) + "</ul>")
    weights = {m: r["layer_weights"] for m, r in by_model.items() if len(r.get("layer_weights") or ()) > 1}
    if weights:
        parts.append(_figure(pictures.layer_weights(weights), f"{task.title}: learned weights of the layers"))
    detections = {m: r["details"]["detection"] for m, r in by_model.items() if r["details"]["detection"]}
    if detections:
        parts.append(_figure(pictures.det(detections), "detection error trade-off"))
    for model, result in by_model.items():
        drawn = pictures.draw(result)
        parts += [
            _figure(drawn[kind], f"{model}: {caption}")
            for kind, caption in (("training", "training"), ("confusion", "confusion"), ("labels", "errors by token"))
            if kind in drawn
        ]
        parts.append(_examples(model, result["details"]["examples"]))
    return "\n".join(parts)


def _examples(model: str, examples: Sequence[Sequence[str]]) -> str:
    if not examples:
        return ""
    rows = "".join(f"{key}\n  true  {truth}\n  taken {guess}\n" for key, truth, guess in examples[:5])
    return f"<details><summary>{escape(model)}: examples</summary><pre>{escape(rows)}</pre></details>"


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = escape(caption, quote=True)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _conditions(results: Results) -> str:
    rows: Iterable[tuple[str, Mapping[str, Any]]] = [
        (model, next(iter(by_task.values()))) for model, by_task in results.items() if by_task
    ]
    lines = [
        f"{model}: {r['model']['source']}, {r['model']['parameters']:,} parameters, {r['model']['features']} features, "
        f"{r['model']['layers']} x {r['model']['width']}, identity {r['model']['identity']}; "
        f"{r['hardware']['device']}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}; "
        f"seed {r['config']['seed']}, configuration {r['config_hash']}"
        for model, r in rows
    ]
    return "<h2>Conditions</h2><pre>" + escape("\n".join(lines)) + "</pre>"
