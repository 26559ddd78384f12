"""`report.md`: the report as text that reads well in a terminal and on a code host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqft.stages.report import figures, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqft.stages.report.facts import Facts


def markdown(facts: Facts) -> str:
    """Return the report as Markdown."""
    parts = [
        f"# {words.model_name(facts.recipe.model)} on {facts.recipe.data.task}",
        f"{words.headline(facts)} **{words.verdict(facts)[1]}**",
        facts.recipe.note,
        _bullets("Not in this folder:", facts.missing),
        "## Results",
        _results(facts),
        *_verification(facts),
        *_training(facts),
        *_sparsity(facts),
        *_search(facts),
        *_ranks(facts),
        *_cost(facts),
        _bullets("## Read this before quoting a number\n", words.notes(facts)),
        *_provenance(facts),
        "## The recipe",
        f"```yaml\n{words.recipe_text(facts.recipe, full=False)}```",
        "<details><summary>With every default written out</summary>",
        f"```yaml\n{words.recipe_text(facts.recipe, full=True)}```",
        "</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(facts: Facts) -> str:
    if not facts.rows:
        return "No evaluation is in this folder."
    heads = [
        "model",
        *(words.column_title(facts, c) for c in facts.columns),
        "zeros",
        "precision",
        "weights",
        "artefact",
    ]
    rows = []
    for row in facts.rows:
        name = f"{row.label} (earlier run)" if row.key == "baseline" else row.label
        scores = [words.score_text(row.scores.get(column)) for column in facts.columns]
        rest = [words.percent_text(row.zeros), row.precision or words.ABSENT, words.bytes_text(row.size_bytes)]
        rows.append([name, *scores, *rest, f"{_code(row.artefact)}, {_code(row.source)}"])
    return table(heads, rows) + "\n\nValue ± one standard error. Zeros: share of the weights of the targeted linears."


def _verification(facts: Facts) -> list[str]:
    if facts.verify is None:
        return []
    rows = [
        [
            "passed" if check["passed"] else "**FAILED**",
            str(check["name"]).replace("_", " "),
            words.number_text(check.get("value")),
            words.number_text(check.get("bound")),
            str(check.get("detail") or ""),
        ]
        for check in facts.verify.get("checks", [])
    ]
    shown = table(["result", "check", "measured", "bound", "detail"], rows)
    return ["## Is the merge exact?", shown, "Source: `verify.json`."]


def _training(facts: Facts) -> list[str]:
    if facts.training is None:
        return []
    _, train, held_out = figures.loss(facts.training)
    heads = ["step", "training loss"]
    rows = [[f"{step:g}", f"{value:.4f}"] for step, value in figures.thin(train, 10)]
    lines = ["## Training", table(heads, rows)]
    if held_out:
        lines.append(
            table(["step", "validation loss"], [[f"{s:g}", f"{v:.4f}"] for s, v in figures.thin(held_out, 10)])
        )
    return [*lines, "Evenly chosen steps. Source: `adapter/sqft/training_log.json`."]


def _sparsity(facts: Facts) -> list[str]:
    if not facts.layers:
        return []
    _, summary = figures.sparsity(facts.layers)
    rows = [[name, *map(words.percent_text, values), f"{weights:,}"] for name, values, weights in summary]
    heads = ["linear, over the layers", "lowest", "mean", "highest", "weights"]
    return ["## Where the zeros are", table(heads, rows), f"Source: `{facts.compressed[0]}/sqft/manifest.json`."]


def _search(facts: Facts) -> list[str]:
    record = facts.search
    if record is None:
        return []
    best = figures.best_so_far(record["trials"])
    better = [
        [f"{number:,}", words.percent_text(trial["accuracy"]), f"{trial['parameters']:,}"]
        for number, trial in enumerate(record["trials"], 1)
        if number == 1 or best[number - 1] > best[number - 2]
    ]
    front = [
        [
            words.percent_text(trial["accuracy"])
            + (" (chosen)" if trial["ranks"] == record["chosen"]["ranks"] else ""),
            f"{trial['parameters']:,}",
        ]
        for trial in record["front"]
    ]
    source = f"Strategy “{record.get('strategy')}”; {record.get('metric')}. Source: `sub_adapter/sqft/search.json`."
    return [
        "## Search",
        words.search_sentence(record),
        "Configurations better than all before them, in order of evaluation:",
        table(["evaluated as number", "accuracy", "adapter parameters"], better),
        "The Pareto front: no other configuration is both more accurate and smaller.",
        table(["accuracy", "adapter parameters"], front),
        source,
    ]


def _ranks(facts: Facts) -> list[str]:
    if facts.ranks is None:
        return []
    _, counts = figures.ranks(facts.ranks)
    rows = [[name, figures.counts_text(found)] for name, found in counts]
    source = f"Strategy “{facts.ranks.get('strategy')}”. Source: `sub_adapter/sqft/ranks.json`."
    return ["## Ranks", table(["group", "rank"], rows), source]


def _cost(facts: Facts) -> list[str]:
    rows = [
        [
            verb,
            _code(folder),
            words.seconds_text(manifest.get("seconds")),
            words.bytes_text(manifest.get("peak_memory_bytes")),
            words.bytes_text(manifest.get("size_bytes")),
            str(manifest.get("result", {}).get("coverage", "")),
        ]
        for verb, folder, manifest in words.stage_rows(facts)
    ]
    if not rows:
        return []
    shown = table(["stage", "folder", "time", "peak memory", "size", "coverage"], rows)
    return ["## What it cost", shown, "Source: `sqft/manifest.json` in each folder."]


def _provenance(facts: Facts) -> list[str]:
    seeds, versions = words.seeds_and_versions(facts)
    if not seeds and not versions:
        return []
    rows = []
    for name in dict.fromkeys([*seeds, *versions]):
        libraries = " ".join(f"{library} {version}" for library, version in versions.get(name, {}).items())
        rows.append([_code(name), str(seeds.get(name, words.ABSENT)), libraries])
    return ["## Where the numbers come from", table(["artefact", "seed", "versions"], rows)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    return f"`{text}`"


def _bullets(title: str, items: Sequence[str]) -> str:
    return title + "\n" + "\n".join(f"- {item}" for item in items) if items else ""
