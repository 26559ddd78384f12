"""The sentences and numbers of a report, shared by its Markdown and HTML."""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

from sqft.recipe import parse_pattern
from sqft.stages.report.facts import VERBS

if TYPE_CHECKING:
    from sqft.recipe import Recipe
    from sqft.stages.report.facts import Facts, Row, Score

ABSENT = "–"  # what no file states


def model_name(reference: str) -> str:
    """Return the short name of a model reference: its last part, without file endings."""
    return re.sub(r"(\.Q\d\w*)?\.gguf$", "", PurePosixPath(reference).name) or reference


def is_fraction(score: Score) -> bool:
    """Tell whether a metric is a share of rows, to be shown in percent."""
    return 0 <= score.value <= 1 and not re.search("perplexity|loss|bits|nll", score.metric)


def value_text(score: Score | None) -> str:
    """Return a score as text: '52.1 %', or '12.345' for what is no share."""
    if score is None:
        return ABSENT
    return f"{100 * score.value:.1f} %" if is_fraction(score) else f"{score.value:.3f}"


def error_text(score: Score | None) -> str:
    """Return '± 3.2' in the unit of :func:`value_text`, empty where there is no standard error."""
    if score is None or score.stderr is None:
        return ""
    return f"± {100 * score.stderr:.1f}" if is_fraction(score) else f"± {score.stderr:.3f}"


def change_text(after: Score, before: Score) -> tuple[str, str]:
    """Return how far a score moved, and its unit; '0' is exact equality."""
    change = after.value - before.value
    share = is_fraction(after)
    return "0" if change == 0 else f"{100 * change:+.1f}" if share else f"{change:+.3f}", "points" if share else ""


def score_text(score: Score | None) -> str:
    """Return value, standard error and number of rows in one line."""
    parts = [value_text(score), error_text(score)]
    if score is not None and score.n is not None:
        parts.append(f"(n = {score.n:,})")
    return " ".join(part for part in parts if part)


def bytes_text(value: float | None) -> str:
    """Return a size in MB or GB (powers of ten)."""
    if value is None:
        return ABSENT
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.{2 if unit == 'GB' else 1 if value < 100 * size else 0}f} {unit}"
    return f"{value:.0f} B"


def seconds_text(value: float | None) -> str:
    """Return a duration: '4.2 s', '3 min 05 s', '2 h 10 min'."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def percent_text(value: float | None) -> str:
    """Return a fraction in percent, with as many digits as it needs (at most two)."""
    return ABSENT if value is None else f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"


def column_title(facts: Facts, column: str) -> str:
    """Return a column's title: its task and metric."""
    metric = next((row.scores[column].metric for row in facts.rows if column in row.scores), "")
    return f"{column} {metric}".strip()


def verdict(facts: Facts) -> tuple[str, str]:
    """Return ('passed' | 'failed' | 'absent', a sentence) about the proof of the merge."""
    if facts.verify is None:
        return "absent", "Not verified: there is no verify.json."
    checks = facts.verify.get("checks", [])
    failed = [check["name"] for check in checks if not check["passed"]]
    if facts.verify.get("passed") and not failed:
        return "passed", f"The merge is verified: all {len(checks)} checks of verify.json passed."
    names = ", ".join(failed) or "see verify.json"
    return "failed", f"NOT VERIFIED: {len(failed)} of {len(checks)} checks of verify.json failed ({names})."


def final_row(facts: Facts) -> Row | None:
    """Return the row of the furthest model of the run that was evaluated."""
    rows = (facts.row(key) for key in ("merged", "tuned", "quantized", "sparse", "dense"))
    return next((row for row in rows if row is not None), None)


def headline(facts: Facts) -> str:
    """Return one sentence about what happened, without the verdict."""
    recipe, final = facts.recipe, final_row(facts)
    done = []
    if "adapter" in facts.manifests:
        done.append(f"fine-tuned on {recipe.data.task}")
    if "merged" in facts.manifests:
        done.append("merged into one model")
    subject = model_name(recipe.model)
    done_to = []
    sparsity = facts.compressed[1].get("sparsity")
    if sparsity and recipe.sparsify is not None:
        done_to.append(f"{percent_text(sparsity)} of its targeted weights set to zero")
    if "quantized" in facts.manifests and recipe.quantize is not None:
        done_to.append(f"{'those left' if done_to else 'its targeted weights'} in {recipe.quantize.bits} bits")
    subject += f" with {' and '.join(done_to)}" if done_to else ""
    subject += f", {' and '.join(done)}," if done else ""
    if final is None:
        return f"{subject.rstrip(',')}: no model of this run was evaluated."
    task, score = next(iter(final.scores.items()))
    n = f", n = {score.n:,}" if score.n is not None else ""
    sentence = f"{subject} scores {_short(score)} on {task} ({score.metric}{n})"
    others = []
    dense = facts.row("dense")
    if dense is not None and dense is not final and task in dense.scores:
        others.append(f"{_short(dense.scores[task])} for the dense model untuned")
    for row in facts.rows:
        if row.key == "baseline" and task in row.scores:
            others.append(f"{_short(row.scores[task])} for {row.label} (an earlier run)")
    return sentence + (f", against {' and '.join(others)}." if others else ".")


def _short(score: Score) -> str:
    return f"{value_text(score)} {error_text(score)}".strip()


def search_sentence(record: dict[str, Any]) -> str:
    """Return what a search did, in one sentence."""
    chosen, heuristic = (percent_text(record[key]["accuracy"]) for key in ("chosen", "heuristic"))
    rows = record["rows"]
    counts = (
        f" ({', '.join(f'{task} {n:,}' for task, n in rows.items())})" if len(rows) > 1 else f" of {next(iter(rows))}"
    )
    return (
        f"{len(record['trials']):,} configurations were evaluated on {sum(rows.values()):,} validation rows{counts}: "
        f"the heuristic scores {heuristic} on them, the chosen configuration {chosen}; these rows are none of those "
        "that the results table reports."
    )


def notes(facts: Facts) -> list[str]:
    """Return what a careful reader must know before quoting a number of this report."""
    found = [*_sampling_notes(facts), *_search_notes(facts), *_baseline_notes(facts), *sparsity_notes(facts)]
    recipe = facts.recipe
    if facts.row("dense") is not None and recipe.finetune and not any(row.key == "baseline" for row in facts.rows):
        found.append(
            "There is no dense + LoRA row: this table does not show what sparsity costs a tuned model. "
            "Run the same recipe without sparsify and name its evaluation in evaluate.baselines."
        )
    found += [
        f"The check {check['name']} of verify.json passes up to {number_text(check['bound'])}, not only at 0."
        for check in (facts.verify or {}).get("checks", [])
        if check.get("bound")
    ]
    resumed = facts.manifests.get("adapter", {}).get("result", {}).get("resumed_at_step")
    if resumed:
        found.append(f"Training was interrupted and resumed at step {resumed}; its time counts from there.")
    if facts.manifests:
        found.append(
            "Time and peak memory are of the machine this ran on; memory is the resident set of the process "
            "(a GPU's own memory is not in it), measured anew for each stage."
        )
    found.append("One seed: the spread between seeds, of training above all, is not in any ± here.")
    return found


def _sampling_notes(facts: Facts) -> list[str]:
    found = []
    for column in facts.columns:
        scores = [row.scores[column] for row in facts.rows if column in row.scores]
        counts = sorted({score.n for score in scores if score.n})
        if not counts or not is_fraction(scores[0]):
            continue
        rows = f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"
        if worst := 100 * max((score.stderr or 0 for score in scores), default=0):
            found.append(
                f"{column}: {rows}, so ± (one standard error) is up to {worst:.1f} points. Read as independent, "
                f"two rows closer than about {2 * math.sqrt(2) * worst:.0f} points cannot be told apart."
            )
        if any(score.value in (0, 1) for score in scores):
            found.append(
                f"{column}: a ± of 0 at 0 % or 100 % is no certainty; with {rows} the true share may lie up to "
                f"{300 / counts[0]:.1f} points away (rule of three)."
            )
    limit = facts.recipe.evaluate.limit if facts.recipe.evaluate else None
    if limit is not None:
        found.append(f"evaluate.limit is {limit}: only the first {limit} rows of each task were scored.")
    return found


def _search_notes(facts: Facts) -> list[str]:
    if facts.search is None:
        return []
    chosen, count = float(facts.search["chosen"]["accuracy"]), sum(facts.search["rows"].values())
    error = 100 * math.sqrt(max(0.0, chosen * (1 - chosen)) / count)
    return [
        f"The chosen configuration's {percent_text(chosen)} was picked out of {len(facts.search['trials']):,} on "
        f"{count:,} validation rows (about ± {error:.1f} points), so it flatters; quote the results table."
    ]


def _baseline_notes(facts: Facts) -> list[str]:
    return [
        f"“{row.label}” was not measured by this run; it comes from {row.source}{f': {row.note}' if row.note else '.'}"
        for row in facts.rows
        if row.key == "baseline"
    ]


def sparsity_notes(facts: Facts) -> list[str]:
    """Return what the zeros are good for, and whether merging filled some."""
    sparsify = facts.recipe.sparsify
    if sparsify is None or not facts.compressed[0]:
        return []
    if parse_pattern(sparsify.pattern) is None:
        found = [
            "Unstructured zeros alone make a model neither smaller nor faster: the folder stores them like other "
            "weights. They pay in a runtime with sparse kernels, in a sparse file format, or under compression."
        ]
    else:
        found = [
            f"{sparsify.pattern} zeros are stored like other weights: the folder is not smaller, and it is faster "
            "only in a runtime with kernels for this pattern."
        ]
    filled = facts.manifests.get("merged", {}).get("result", {}).get("filled_zeros", 0)
    if filled:
        found.append(f"Merging a dense adapter filled {filled:,} zeros (merge.allow_sparsity_loss).")
    return found


def recipe_text(recipe: Recipe, *, full: bool) -> str:
    """Return the recipe as YAML; `full` with every default written out."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json", exclude_defaults=not full), sort_keys=False, allow_unicode=True, width=100
    )


def stage_rows(facts: Facts) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (verb, folder, manifest) of each finished stage."""
    return [(VERBS[name], f"{name}/", manifest) for name, manifest in facts.manifests.items()]


def seeds_and_versions(facts: Facts) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Return {file: seed} and {file: versions} of every artefact that states them."""
    seeds = {f"{name}/": m["seed"] for name, m in facts.manifests.items() if "seed" in m}
    versions = {f"{name}/": m["versions"] for name, m in facts.manifests.items() if "versions" in m}
    for row in facts.rows:
        if row.seed is not None:
            seeds[row.source] = row.seed
        if row.versions:
            versions[row.source] = row.versions
    return seeds, versions


def number_text(value: Any) -> str:
    """Return a check's value or bound: short, exact where it is a count."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return ABSENT if value is None else str(value)
