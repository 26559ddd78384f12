"""The sections of a report, each built once from the facts; the model card takes some of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from sqft.pages.blocks import (
    Badge,
    Block,
    Cell,
    Code,
    Columns,
    Figure,
    Folded,
    Items,
    Page,
    Row,
    Section,
    Table,
    Text,
    Tiles,
)
from sqft.pages.charts import Dot, dot_plot
from sqft.pages.text import ABSENT, bytes_text, model_name, number_text, percent_text, seconds_text
from sqft.stages.report import figures, words
from sqft.stages.report.facts import VERBS, finite

if TYPE_CHECKING:
    from sqft.stages.report.facts import Facts

_CHARTS = 4  # tasks that are drawn; the table has all


def report(facts: Facts) -> Page:
    """Return the page of a run."""
    parts: list[tuple[str, str, list[Block]]] = [
        ("results", "Results", _results(facts)),
        ("verification", "Is the merge exact?", verification(facts)),
        ("training", "Training", _training(facts)),
        ("sparsity", "Where the zeros are", _sparsity(facts)),
        ("search", "Search", _search(facts)),
        ("ranks", "Ranks", _ranks(facts)),
        ("cost", "What it cost", _cost(facts)),
        ("notes", "Read this before quoting a number", [Items(words.notes(facts))]),
        ("provenance", "Where the numbers come from", _provenance(facts)),
        ("recipe", "The recipe", _recipe(facts)),
    ]
    recipe = facts.recipe
    title = f"{model_name(recipe.model)} on {recipe.data.task}"
    return Page(title, [Section(*part) for part in parts], _head(facts), recipe.name)


def _head(facts: Facts) -> list[Block]:
    head: list[Block] = [Text(words.headline(facts), "lead"), Badge(*words.verdict(facts))]
    if facts.recipe.note:
        head.append(Text(facts.recipe.note, "aside"))
    if facts.missing:
        head.append(Items(facts.missing, "Not in this folder"))
    tiles = _tiles(facts)
    return [*head, Tiles(tiles)] if tiles else head


def _tiles(facts: Facts) -> list[tuple[str, str, str, str]]:
    tiles: list[tuple[str, str, str, str]] = []
    if (final := facts.final) is not None:
        task, score = next(iter(final.scores.items()))
        label = f"{task} {score.metric}, {final.key}"
        tiles.append((label, score.cell.text, score.cell.error, final.source))
        tuned = facts.model("tuned")
        if final.key == "merged" and tuned is not None and task in tuned.scores:
            change = score.change_from(tuned.scores[task])
            tiles.append(("changed by merging", *change, "merged.json − tuned.json"))
    folder, compressed = facts.compressed
    if "sparsity" in compressed:
        share = percent_text(compressed["sparsity"])
        tiles.append(("targeted weights that are zero", share, "", f"{folder}/sqft/manifest.json"))
    if costs := [m for m in facts.manifests.values() if "seconds" in m]:
        peak = bytes_text(max(m.get("peak_memory_bytes") or 0 for m in costs))
        label = f"for the stages, evaluation not counted; peak memory {peak}"
        tiles.append((label, seconds_text(sum(m["seconds"] for m in costs)), "", "*/sqft/manifest.json"))
    return tiles


def _results(facts: Facts) -> list[Block]:
    if not facts.models:
        return [Text("No evaluation is in this folder.", "empty")]
    charts = [_dots(facts, column, title) for column, title in list(facts.columns.items())[:_CHARTS]]
    return [Columns(charts), results_table(facts)]


def results_table(facts: Facts, this: str = "") -> Table:
    """Return the results of all models; on the card of one of them, by its key `this`, without where they lie."""
    tags = {"baseline": "earlier run", this: "this model"}
    rows = []
    for model in facts.models:
        scores = [model.scores[column].cell if column in model.scores else ABSENT for column in facts.columns]
        rest = [percent_text(model.zeros), model.precision or ABSENT, bytes_text(model.size_bytes)]
        name = Cell(model.label, tag=tags.get(model.key, ""))
        rows.append(Row([name, *scores, *rest], f"`{model.artefact}` `{model.source}`", model.key))
    heads = ["Model", *facts.columns.values(), "Zeros", "Precision", "Weights on disk"]
    caption = "Value ± one standard error. Zeros: share of the weights of the targeted linears."
    if any(score.metric == "nll" for model in facts.models for score in model.scores.values()):
        caption += " NLL: mean negative log-likelihood of the right answers' tokens, lower is better."
    return Table(heads, rows, caption, notes="" if this else "Artefact")


def _dots(facts: Facts, column: str, title: str) -> list[Block]:
    """Draw one task's scores; metrics that are no shares have no common axis to draw them on."""
    scores = [(model, model.scores[column]) for model in facts.models if column in model.scores]
    dots = [
        Dot(model.label, 100 * score.value, None if score.stderr is None else 100 * score.stderr, score.text, model.key)
        for model, score in scores
        if score.is_share
    ]
    return [Figure(dot_plot(dots, title, unit=" %"), title)] if dots else []


def verification(facts: Facts) -> list[Block]:
    """Return what verify checked."""
    if facts.verify is None:
        merges = facts.recipe.finetune is not None and facts.recipe.merge is not None
        why = "There is no verify.json: the merge is unproven."
        return [Text(why if merges else "This recipe merges nothing, so there is nothing to verify.", "empty")]
    rows = []
    for check in facts.verify.get("checks", []):
        state = "passed" if check["passed"] else "failed"
        numbers = [number_text(check.get(key)) for key in ("value", "bound")]
        name = str(check["name"]).replace("_", " ")
        rows.append(Row([name, Badge(state, state), *numbers], str(check.get("detail") or ""), state))
    caption = "Source: verify.json. Merged model against base with the unmerged adapter."
    return [Table(["Check", "Result", "Measured", "Bound"], rows, caption, notes="Detail")]


def _training(facts: Facts) -> list[Block]:
    if (log := facts.training) is None:
        return [Text("This recipe trains nothing.", "empty")] if facts.recipe.finetune is None else []
    steps, held_out = log.get("train", []), finite(log.get("eval", []), "eval_loss")
    distilled = any("task_loss" in step for step in steps)
    train = finite(steps, "task_loss" if distilled else "loss")  # what the validation loss compares with
    said = [f"{len(train)} optimiser steps logged."]
    if distilled:
        said.append("The training loss is that of the answers, without what is learnt from the teacher.")
    if held_out:
        said.append(f"Last validation loss {held_out[-1][1]:.4f} at step {held_out[-1][0]:g}.")
    else:
        said.append("No validation loss was measured.")
    if rates := finite(steps, "learning_rate"):
        said.append(f"Learning rate at most {max(rate for _, rate in rates):.3g}.")
    if dropped := len(steps) - len(train):
        said.append(f"{dropped} logged losses are not finite and are not drawn.")
    tables = [
        Table(["Step", name], [Row([f"{x:g}", f"{y:.4f}"]) for x, y in figures.thin(points, 24)], caption)
        for name, points, caption in (
            ("Training loss", train, "Evenly chosen steps; the file has all."),
            ("Validation loss", held_out, ""),
        )
        if points
    ]
    text = " ".join([*said, "Source: adapter/sqft/training_log.json."])
    return [_beside(figures.loss(train, held_out), text, "Losses as a table", *tables)]


def _sparsity(facts: Facts) -> list[Block]:
    folder, compressed = facts.compressed
    if not compressed.get("layers"):
        return [] if facts.recipe.sparsify else [Text("This recipe prunes nothing.", "empty")]
    chart, kinds = figures.sparsity(compressed["layers"])
    source = f"Source: {folder}/sqft/manifest.json"
    source += f"; the mask itself is {folder}/sqft/mask.safetensors." if facts.recipe.sparsify else "."
    coverage = f"{compressed['coverage']}. " if compressed.get("coverage") else ""
    rows = [Row([name, *map(percent_text, values), f"{weights:,}"]) for name, values, weights in kinds]
    shown = Table(["Linear", "Lowest", "Mean", "Highest", "Weights"], rows, "Over the layers.")
    return [_beside(chart, coverage + source, "Sparsity by kind of linear", shown)]


def _search(facts: Facts) -> list[Block]:
    if (record := facts.search) is None:
        return []
    trials, chosen = record["trials"], record["chosen"]["ranks"]
    front = []
    for trial in record["front"]:
        accuracy = Cell(percent_text(trial["accuracy"]), tag="chosen" if trial["ranks"] == chosen else "")
        front.append(Row([accuracy, f"{trial['parameters']:,}"]))
    every = [
        Row([str(number), percent_text(trial["accuracy"]), percent_text(best), f"{trial['parameters']:,}"])
        for number, (trial, best) in enumerate(zip(trials, figures.best_so_far(trials), strict=True), 1)
    ]
    path = Figure(figures.search_path(record), "In order of evaluation")
    size = Figure(figures.search_front(record), "Against size")
    source = f"Strategy “{record.get('strategy')}”; {record.get('metric')}. Source: sub_adapter/sqft/search.json."
    heads = ["Configuration", "Accuracy", "Best so far", "Adapter parameters"]
    return [
        Text(words.search_sentence(record)),
        Columns([[path], [size]]),
        Table(
            ["Accuracy on the validation rows", "Adapter parameters"],
            front,
            "The Pareto front: no other configuration is both more accurate and smaller.",
        ),
        Text(source, "source-line"),
        Folded("Every configuration", [Table(heads, every, "In order of evaluation.")]),
    ]


def _ranks(facts: Facts) -> list[Block]:
    if facts.ranks is None:
        return []
    chart, counts = figures.ranks(facts.ranks)
    choices = ", ".join(str(choice) for choice in facts.ranks.get("choices", []))
    strategy = f"Chosen by strategy “{facts.ranks.get('strategy')}” from ranks {choices}."
    rows = [Row([name, figures.counts_text(found)]) for name, found in counts]
    shown = Table(["Group", "Ranks over the layers"], rows)
    return [_beside(chart, f"{strategy} Source: sub_adapter/sqft/ranks.json.", "Ranks as a table", shown)]


def _beside(chart: str, text: str, title: str, *tables: Table) -> Columns:
    """Return a chart with its text and its numbers beside it."""
    said: list[Block] = [Text(text, "source-line")]
    return Columns([[Figure(chart)] if chart else [], said + ([Folded(title, tables)] if tables else [])])


def _cost(facts: Facts) -> list[Block]:
    if not facts.manifests:
        return []
    longest = max(manifest.get("seconds") or 0 for manifest in facts.manifests.values()) or 1
    rows = []
    for name, manifest in facts.manifests.items():
        seconds = manifest.get("seconds")
        sizes = [bytes_text(manifest.get(key)) for key in ("peak_memory_bytes", "size_bytes")]
        did = str(manifest.get("result", {}).get("coverage", ""))
        note = f"`{name}/`" + (f" · {did}" if did else "")
        rows.append(Row([VERBS[name], Cell(seconds_text(seconds), bar=(seconds or 0) / longest), *sizes], note))
    caption = "Source: sqft/manifest.json in each folder. Evaluation and verification are not in it."
    return [Table(["Stage", "Time", "Peak memory", "Size"], rows, caption, notes="Folder")]


def _provenance(facts: Facts) -> list[Block]:
    made = {f"{name}/": manifest for name, manifest in facts.manifests.items()}
    seeds = {name: manifest["seed"] for name, manifest in made.items() if "seed" in manifest}
    seeds |= {model.source: model.seed for model in facts.models if model.seed is not None}
    versions = {name: manifest["versions"] for name, manifest in made.items() if "versions" in manifest}
    versions |= {model.source: model.versions for model in facts.models if model.versions}
    if not seeds and not versions:
        return []
    rows = [
        Row([f"`{name}`", str(seed), f"`{str(made.get(name, {}).get('digest', ABSENT))[:12]}`"])
        for name, seed in seeds.items()
    ]
    shown = Table(["Artefact", "Seed", "SHA-256"], rows, "First digits; manifests hold them whole.")
    return [Columns([[shown], [_versions(versions)]])]


def _versions(found: dict[str, dict[str, str]]) -> Table:
    """Show each library's version, with the artefacts that were made by another one."""
    rows = []
    for library in dict.fromkeys(name for value in found.values() for name in value):
        versions = {artefact: value[library] for artefact, value in found.items() if library in value}
        ((most, _),) = Counter(versions.values()).most_common(1)
        others: dict[str, list[str]] = {}
        for artefact, version in versions.items():
            if version != most:
                others.setdefault(version, []).append(artefact)
        note = "; ".join(f"{version} for {', '.join(names)}" for version, names in others.items())
        rows.append(Row([library, most], note))
    caption = "Where an artefact was made with another, it is named."
    return Table(["Library", "Version"], rows, caption, notes="Others")


def _recipe(facts: Facts) -> list[Block]:
    short, full = (Code(words.recipe_text(facts.recipe, full=full), "yaml") for full in (False, True))
    return [short, Folded("With every default written out", [full])]
