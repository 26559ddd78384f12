"""`report.html`: one self-contained page. Looks are in style.css, charts in charts.py, sentences in words.py."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from sqft.artifact import versions
from sqft.stages.report import figures, words
from sqft.stages.report.charts import Dot, dot_plot
from sqft.stages.report.facts import finite

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from sqft.stages.report.facts import Facts, Row, Score

TICK = '<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d="M3 8.5 6.5 12 13 4.5"/></svg>'
CROSS = '<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d="M4 4l8 8M12 4l-8 8"/></svg>'
DASH = '<svg class="icon" viewBox="0 0 16 16" aria-hidden="true"><path d="M3.5 8h9"/></svg>'
ICONS = {"passed": TICK, "failed": CROSS, "absent": DASH}


def page(facts: Facts) -> str:
    """Return the report as one HTML document that loads nothing."""
    title = f"{words.model_name(facts.recipe.model)} on {facts.recipe.data.task}"
    sections = [
        ("results", "Results", _results(facts)),
        ("verification", "Is the merge exact?", _verification(facts)),
        ("training", "Training", _training(facts)),
        ("sparsity", "Where the zeros are", _sparsity(facts)),
        ("search", "Search", _search(facts)),
        ("ranks", "Ranks", _ranks(facts)),
        ("cost", "What it cost", _cost(facts)),
        ("notes", "Read this before quoting a number", _list(words.notes(facts))),
        ("provenance", "Where the numbers come from", _provenance(facts)),
        ("recipe", "The recipe", _recipe(facts)),
    ]
    return document(title, _header(facts, title), sections, "report.md says the same as text.")


def document(title: str, header: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """Return an HTML document that loads nothing.

    Args:
        title: of the window, plain text.
        header: HTML above the sections.
        sections: (id, heading, HTML); an empty one is left out.
        footer: plain text.
    """
    style = files("sqft.stages.report").joinpath("style.css").read_text(encoding="utf-8")
    body = "".join(
        f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections if content
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · sqft report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{header}\n<main>{body}</main>\n"
        f"<footer>Written by sqft {escape(versions()['sqft'])} from the files in this folder. "
        f"{escape(footer)}</footer>\n</body>\n</html>\n"
    )


def _header(facts: Facts, title: str) -> str:
    state, sentence = words.verdict(facts)
    # A number, its unit and its error stay on one line.
    lead = escape(words.headline(facts)).replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")
    note = f'<p class="aside">{escape(facts.recipe.note)}</p>' if facts.recipe.note else ""
    missing = ""
    if facts.missing:
        missing = f'<div class="callout" role="note"><strong>Not in this folder</strong>{_list(facts.missing)}</div>'
    return (
        f'<header><p class="eyebrow">sqft report <span>{escape(facts.recipe.name)}</span></p><h1>{escape(title)}</h1>'
        f'<p class="lead">{lead}</p>{_badge(state, sentence)}'
        f"{note}{missing}{_tiles(facts)}</header>"
    )


def _badge(state: str, text: str) -> str:
    return f'<p class="verdict {state}">{ICONS[state]}<span>{escape(text)}</span></p>'


def _tiles(facts: Facts) -> str:
    tiles: list[tuple[str, str, str, str]] = []
    final = words.final_row(facts)
    if final is not None:
        task, score = next(iter(final.scores.items()))
        label = f"{task} {score.metric}, {final.key}"
        tiles.append((label, words.value_text(score), words.error_text(score), final.source))
        tuned = facts.row("tuned")
        if final.key == "merged" and tuned is not None and task in tuned.scores:
            value, unit = words.change_text(score, tuned.scores[task])
            tiles.append(("changed by merging", value, unit, "merged.json − tuned.json"))
    folder, compressed = facts.compressed
    if "sparsity" in compressed:
        share = words.percent_text(compressed["sparsity"])
        tiles.append(("targeted weights that are zero", share, "", f"{folder}/sqft/manifest.json"))
    costs = [m for m in facts.manifests.values() if "seconds" in m]
    if costs:
        peak = words.bytes_text(max(m.get("peak_memory_bytes") or 0 for m in costs))
        total = words.seconds_text(sum(m["seconds"] for m in costs))
        tiles.append((f"for the stages, evaluation not counted; peak memory {peak}", total, "", "*/sqft/manifest.json"))
    drawn = "".join(
        f'<div class="tile"><dt>{escape(label)}</dt><dd><b>{escape(value)}</b> <span>{escape(extra)}</span></dd>'
        f'<dd class="source">{escape(source)}</dd></div>'
        for label, value, extra, source in tiles
    )
    return f'<dl class="tiles">{drawn}</dl>' if drawn else ""


def _results(facts: Facts) -> str:
    if not facts.rows:
        return '<p class="empty">No evaluation is in this folder.</p>'
    heads = [("Model", ""), *((words.column_title(facts, column), "num") for column in facts.columns)]
    heads += [("Zeros", "num"), ("Precision", "num"), ("Weights on disk", "num")]
    rows = []
    for row in facts.rows:
        tag = ' <span class="tag">earlier run</span>' if row.key == "baseline" else ""
        where = f"<code>{escape(row.artefact)}</code> <code>{escape(row.source)}</code>"
        scores = [_score(row.scores.get(column)) for column in facts.columns]
        precision = escape(row.precision or words.ABSENT)
        rest = [words.percent_text(row.zeros), precision, words.bytes_text(row.size_bytes)]
        rows.append(table_row(escape(row.label) + tag, [*scores, *rest], where, row.key))
    caption = "Value ± one standard error. Zeros: share of the weights of the targeted linears."
    return charts(*(_dots(facts, column) for column in facts.columns[:4])) + table(heads, rows, caption)


def _score(score: Score | None) -> str:
    if score is None:
        return words.ABSENT
    n = f'<span class="where">n = {score.n:,}</span>' if score.n is not None else ""
    return f'<b>{words.value_text(score)}</b> <span class="error">{words.error_text(score)}</span>{n}'


def _dots(facts: Facts, column: str) -> str:
    """Draw one task's scores; metrics that are no shares have no common axis to draw them on."""
    rows: Sequence[Row] = [row for row in facts.rows if column in row.scores and words.is_fraction(row.scores[column])]
    if not rows:
        return ""
    dots = []
    for row in rows:
        score = row.scores[column]
        half = None if score.stderr is None else 100 * score.stderr
        text = f"{words.value_text(score)} {words.error_text(score)}".strip()
        dots.append(Dot(row.label, 100 * score.value, half, text, row.key))
    title = words.column_title(facts, column)
    return f"<div><h3>{escape(title)}</h3>{dot_plot(dots, title, unit=' %')}</div>"


def _verification(facts: Facts) -> str:
    if facts.verify is None:
        if facts.recipe.finetune is None or facts.recipe.merge is None:
            return '<p class="empty">This recipe merges nothing, so there is nothing to verify.</p>'
        return '<p class="empty">There is no verify.json: the merge is unproven.</p>'
    rows = []
    for check in facts.verify.get("checks", []):
        state = "passed" if check["passed"] else "failed"
        numbers = [escape(words.number_text(check.get(key))) for key in ("value", "bound")]
        name = escape(str(check["name"]).replace("_", " "))
        rows.append(table_row(name, [_badge(state, state), *numbers], escape(str(check.get("detail") or "")), state))
    heads = [("Check", ""), ("Result", "num"), ("Measured", "num"), ("Bound", "num")]
    return table(heads, rows, "Source: verify.json. Merged model against base with the unmerged adapter.")


def _training(facts: Facts) -> str:
    if facts.training is None:
        return '<p class="empty">This recipe trains nothing.</p>' if facts.recipe.finetune is None else ""
    log = facts.training
    chart, train, held_out = figures.loss(log)
    dropped = len(log.get("train", [])) - len(train)
    lost = f" {dropped} logged losses are not finite and are not drawn." if dropped else ""
    rows = [table_row(f"{step:g}", [f"{value:.4f}"]) for step, value in figures.thin(train, 24)]
    rates = finite(log.get("train", []), "learning_rate")
    peak = f" Learning rate at most {max(rate for _, rate in rates):.3g}." if rates else ""
    last = (
        f" Last validation loss {held_out[-1][1]:.4f} at step {held_out[-1][0]:g}."
        if held_out
        else " No validation loss was measured."
    )
    text = f"{len(train)} optimiser steps logged.{last}{peak}{lost} Source: adapter/sqft/training_log.json."
    shown = table([("Step", ""), ("Training loss", "num")], rows, "Evenly chosen steps; the file has all.")
    return charts(chart, _beside(text, "Losses as a table", shown))


def _sparsity(facts: Facts) -> str:
    if not facts.layers:
        return "" if facts.recipe.sparsify else '<p class="empty">This recipe prunes nothing.</p>'
    chart, summary = figures.sparsity(facts.layers)
    folder, compressed = facts.compressed
    coverage = compressed.get("coverage", "")
    rows = [
        table_row(escape(name), [*map(words.percent_text, values), f"{weights:,}"]) for name, values, weights in summary
    ]
    heads = [("Linear", ""), ("Lowest", "num"), ("Mean", "num"), ("Highest", "num"), ("Weights", "num")]
    source = f"Source: {folder}/sqft/manifest.json"
    source += f"; the mask itself is {folder}/sqft/mask.safetensors." if facts.recipe.sparsify else "."
    text = f"{coverage}. {source}" if coverage else source
    shown = table(heads, rows, "Over the layers.")
    return charts(chart, _beside(text, "Sparsity by kind of linear", shown))


def _search(facts: Facts) -> str:
    record = facts.search
    if record is None:
        return ""
    chosen = record["chosen"]["ranks"]
    front = [
        table_row(
            words.percent_text(trial["accuracy"])
            + (' <span class="tag chosen">chosen</span>' if trial["ranks"] == chosen else ""),
            [f"{trial['parameters']:,}"],
        )
        for trial in record["front"]
    ]
    rows = [
        table_row(f"{number}", [*map(words.percent_text, (trial["accuracy"], best)), f"{trial['parameters']:,}"])
        for number, (trial, best) in enumerate(
            zip(record["trials"], figures.best_so_far(record["trials"]), strict=True), 1
        )
    ]
    heads = [("Configuration", ""), ("Accuracy", "num"), ("Best so far", "num"), ("Adapter parameters", "num")]
    caption = "The Pareto front: no other configuration is both more accurate and smaller."
    path, size = figures.search_path(record), figures.search_front(record)
    source = f"Strategy “{record.get('strategy')}”; {record.get('metric')}. Source: sub_adapter/sqft/search.json."
    return (
        f"<p>{escape(words.search_sentence(record))}</p>"
        f"{charts(f'<div><h3>In order of evaluation</h3>{path}</div>', f'<div><h3>Against size</h3>{size}</div>')}"
        f"{table([('Accuracy on the validation rows', ''), ('Adapter parameters', 'num')], front, caption)}"
        f'<p class="source-line">{escape(source)}</p>'
        f"{_details('Every configuration', table(heads, rows, 'In order of evaluation.'))}"
    )


def _ranks(facts: Facts) -> str:
    if facts.ranks is None:
        return ""
    chart, counts = figures.ranks(facts.ranks)
    rows = [table_row(escape(name), [escape(figures.counts_text(found))]) for name, found in counts]
    choices = ", ".join(str(choice) for choice in facts.ranks.get("choices", []))
    strategy = f"Chosen by strategy “{facts.ranks.get('strategy')}” from ranks {choices}."
    source = "Source: sub_adapter/sqft/ranks.json."
    shown = table([("Group", ""), ("Ranks over the layers", "num")], rows, "")
    return charts(chart, _beside(f"{strategy} {source}", "Ranks as a table", shown))


def _cost(facts: Facts) -> str:
    stages = words.stage_rows(facts)
    if not stages:
        return ""
    longest = max((m.get("seconds") or 0 for _, _, m in stages), default=0) or 1
    rows = []
    for verb, folder, manifest in stages:
        seconds = manifest.get("seconds")
        bar = f'<span class="bar" aria-hidden="true"><i style="width:{100 * (seconds or 0) / longest:.1f}%"></i></span>'
        did = escape(str(manifest.get("result", {}).get("coverage", "")))
        sizes = [words.bytes_text(manifest.get(key)) for key in ("peak_memory_bytes", "size_bytes")]
        where = f"<code>{folder}</code> {f'<span>{did}</span>' if did else ''}"
        rows.append(table_row(verb, [words.seconds_text(seconds) + bar, *sizes], where))
    heads = [("Stage", ""), ("Time", "num"), ("Peak memory", "num"), ("Folder", "num")]
    return table(heads, rows, "Source: sqft/manifest.json in each folder. Evaluation and verification are not in it.")


def _provenance(facts: Facts) -> str:
    seeds, found = words.seeds_and_versions(facts)
    if not seeds and not found:
        return ""
    rows = []
    for name, seed in seeds.items():
        digest = str(facts.manifests.get(name.rstrip("/"), {}).get("digest", words.ABSENT))[:12]
        rows.append(table_row(f"<code>{escape(name)}</code>", [escape(str(seed)), f"<code>{digest}</code>"]))
    heads = [("Artefact", ""), ("Seed", "num"), ("SHA-256", "num")]
    return f'<div class="pair">{table(heads, rows, "First digits; manifests hold them whole.")}{_versions(found)}</div>'


def _versions(found: dict[str, dict[str, str]]) -> str:
    """Show each library's version, with the artefacts that were made by another one."""
    rows = []
    for library in dict.fromkeys(name for value in found.values() for name in value):
        by_version: dict[str, list[str]] = {}
        for artefact, value in found.items():
            if library in value:
                by_version.setdefault(value[library], []).append(artefact)
        most = max(by_version, key=lambda version: len(by_version[version]))
        others = [f"{version} for {', '.join(names)}" for version, names in by_version.items() if version != most]
        rows.append(table_row(escape(library), [escape(most)], escape("; ".join(others))))
    return table([("Library", ""), ("Version", "num")], rows, "Where an artefact was made with another, it is named.")


def _recipe(facts: Facts) -> str:
    short, full = (escape(words.recipe_text(facts.recipe, full=full)) for full in (False, True))
    pre = '<pre tabindex="0"><code>{}</code></pre>'
    return pre.format(short) + _details("With every default written out", pre.format(full))


def table_row(head: str, cells: Sequence[str], where: str = "", style: str = "") -> str:
    """Return a table row; head, cells and the small print under the head are HTML already."""
    below = f'<span class="where">{where}</span>' if where else ""
    numbers = "".join(f'<td class="num">{cell}</td>' for cell in cells)
    return f'<tr class="{style}"><th scope="row">{head}{below}</th>{numbers}</tr>'


def table(heads: list[tuple[str, str]], rows: list[str], caption: str) -> str:
    """Return a table that scrolls sideways by itself where it does not fit."""
    head = "".join(f'<th scope="col" class="{style}">{escape(name)}</th>' for name, style in heads)
    below = f'<p class="caption">{escape(caption)}</p>' if caption else ""
    return (
        f'<div><div class="scroll" tabindex="0" role="group" aria-label="table: {escape(heads[0][0])}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{below}</div>"
    )


def charts(*items: str) -> str:
    """Return charts, or a chart and its text, side by side where the page is wide enough."""
    drawn = "".join(items)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _beside(text: str, title: str, content: str) -> str:
    return f'<div><p class="source-line">{escape(text)}</p>{_details(title, content)}</div>'


def _list(items: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def _details(title: str, content: Any) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
