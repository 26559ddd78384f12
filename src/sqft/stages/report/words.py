"""The sentences of a report: what happened, whether it is proved, and what to know before quoting a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import yaml

from sqft.pages.text import model_name, number_text, percent_text
from sqft.recipe import parse_pattern
from sqft.stages.report.models import filled_zeros

if TYPE_CHECKING:
    from sqft.recipe import Recipe
    from sqft.stages.report.facts import Facts


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


def headline(facts: Facts) -> str:
    """Return one sentence about what happened, without the verdict."""
    recipe, final = facts.recipe, facts.final
    compressed = []
    sparsity = facts.compressed[1].get("sparsity")
    if sparsity and recipe.sparsify is not None:
        compressed.append(f"{percent_text(sparsity)} of its targeted weights set to zero")
    if "quantized" in facts.manifests and recipe.quantize is not None:
        compressed.append(f"{'those left' if compressed else 'its targeted weights'} in {recipe.quantize.bits} bits")
    done = [f"fine-tuned on {recipe.data.task}"] if "adapter" in facts.manifests else []
    done += ["merged into one model"] if "merged" in facts.manifests else []
    subject = " with ".join(filter(None, [model_name(recipe.model), " and ".join(compressed)]))
    subject = ", ".join(filter(None, [subject, " and ".join(done)]))
    if final is None:
        return f"{subject}: no model of this run was evaluated."
    task, score = next(iter(final.scores.items()))
    about = ", ".join(filter(None, [score.metric, score.cell.below]))
    which = ", which was compressed" if recipe.teacher is not None and recipe.teacher.compress else ""
    others = [(model, "for the dense model untuned") for model in facts.models if model.key == "dense"]
    others += [(model, f"for {model.label}{which}") for model in facts.models if model.key == "teacher"]
    others += [(model, f"for {model.label} (an earlier run)") for model in facts.models if model.key == "baseline"]
    against = [f"{m.scores[task].text} {what}" for m, what in others if m is not final and task in m.scores]
    sentence = f"{subject}{',' if done else ''} scores {score.text} on {task} ({about})"
    return sentence + (f", against {' and '.join(against)}." if against else ".")


def search_sentence(record: dict[str, Any]) -> str:
    """Return what a search did, in one sentence."""
    chosen, heuristic = (percent_text(record[key]["accuracy"]) for key in ("chosen", "heuristic"))
    rows = record["rows"]
    tasks = ", ".join(f"{task} {n:,}" for task, n in rows.items())
    return (
        f"{len(record['trials']):,} configurations were evaluated on {sum(rows.values()):,} validation rows"
        f"{f' ({tasks})' if len(rows) > 1 else f' of {next(iter(rows))}'}: the heuristic scores {heuristic} on them, "
        f"the chosen configuration {chosen}; these rows are none of those that the results table reports."
    )


def notes(facts: Facts) -> list[str]:
    """Return what a careful reader must know before quoting a number of this report."""
    found = [*_sampling_notes(facts), *_search_notes(facts)]
    baselines = [model for model in facts.models if model.key == "baseline"]
    found += [
        f"“{model.label}” was not measured by this run; it comes from {model.source}"
        f"{f': {model.note}' if model.note else '.'}"
        for model in baselines
    ]
    found += sparsity_notes(facts)
    if facts.model("dense") is not None and facts.recipe.finetune and not (baselines or facts.model("teacher")):
        found.append(
            "There is no dense + LoRA row: this table does not show what sparsity costs a tuned model. "
            "Run the same recipe without sparsify and name its evaluation in evaluate.baselines."
        )
    found += [
        f"The check {check['name']} of verify.json passes up to {number_text(check['bound'])}, not only at 0."
        for check in (facts.verify or {}).get("checks", [])
        if check.get("bound")
    ]
    if resumed := facts.manifests.get("adapter", {}).get("result", {}).get("resumed_at_step"):
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
        scores = [model.scores[column] for model in facts.models if column in model.scores]
        counts = sorted({score.n for score in scores if score.n})
        if not counts or not scores[0].is_share:
            continue
        rows = f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"
        if worst := 100 * max(score.stderr or 0 for score in scores):
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


def sparsity_notes(facts: Facts) -> list[str]:
    """Return what the zeros are good for, and whether merging filled some; nothing of a model that was not pruned."""
    sparsify = facts.recipe.sparsify
    if sparsify is None or not facts.compressed[1]:
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
    if filled := filled_zeros(facts.manifests):
        found.append(f"Merging a dense adapter filled {filled:,} zeros (merge.allow_sparsity_loss).")
    return found


def recipe_text(recipe: Recipe, *, full: bool) -> str:
    """Return the recipe as YAML; `full` with every default written out."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json", exclude_defaults=not full), sort_keys=False, allow_unicode=True, width=100
    )
