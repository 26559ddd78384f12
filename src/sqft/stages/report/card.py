"""`merged/README.md`: the model card that a merged folder is published with.

The card is written after the folder was finished and is no part of what the folder's manifest records, so writing it
changes no digest and no key. A card that the base model brought along is kept below ours. Which text is whose is told
from the manifest (it has the digest of the base's card) and from the mark that ours bears; a README.md that is neither
is a person's own and is left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sqft.digests import digest_file
from sqft.model.load import read_json
from sqft.stages.report import words
from sqft.stages.report.facts import stored_precision, zeros_of
from sqft.stages.report.markdown import table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqft.stages.report.facts import Facts

CARD = "README.md"
MARK = "<!-- Written by sqft report, which writes it anew unless this line is removed. -->"
BASE_HEADING = "## The base model's own card"
FOLDER = "path/to/this/folder"


@dataclass(frozen=True)
class BaseCard:
    """What the base model's card says.

    Attributes:
        licence: the licence fields of its front matter, which hold for what is made from the model too.
        text: it without its front matter.
    """

    licence: dict[str, str] = field(default_factory=dict)
    text: str = ""


def base_card(folder: Path, manifest: Mapping[str, Any]) -> BaseCard | None:
    """Return the base's card as a merged folder has it, alone or in an earlier card of ours.

    Args:
        folder: the merged folder.
        manifest: its manifest.

    Returns:
        An empty card if the base brought none; None if the folder's README.md is a person's own, to be left alone.
    """
    path = folder / CARD
    if not path.is_file():
        return BaseCard()
    front, text = _split(path.read_text(encoding="utf-8-sig", errors="replace"))
    if manifest.get("files", {}).get(CARD) != digest_file(path):
        if MARK not in text.partition(f"\n{BASE_HEADING}\n")[0]:
            return None
        text = text.partition(f"\n{BASE_HEADING}\n")[2]
    licence = {key: value for key, value in front.items() if str(key).startswith("license") and isinstance(value, str)}
    return BaseCard(licence, text.strip())


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return the fields of a card's YAML front matter, none if it cannot be read, and the text after it."""
    match = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|$)", text, re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, text
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError:
        front = None
    return front if isinstance(front, dict) else {}, text[match.end() :]


def model_card(facts: Facts, base: BaseCard | None = None) -> str:
    """Return the README.md of a run's merged model.

    Args:
        facts: of the run.
        base: the base model's own card, which is kept at the end.
    """
    base = base or BaseCard()
    front = yaml.safe_dump(_front_matter(facts, base), sort_keys=False, allow_unicode=True)
    data = facts.recipe.data
    limit = f", at most {data.train_limit:,} training rows" if data.train_limit else ""
    parts = [
        f"---\n{front}---",
        MARK,
        f"# {words.model_name(facts.recipe.model)} on {data.task}",
        f"{words.headline(facts)} Made with sqft: one model, which needs no adapter and no sqft to run.",
        facts.recipe.note,
        f"- Base model: `{facts.recipe.model}`\n- Data: `{data.task}`{limit}\n"
        f"- Sparsity: {_sparsity(facts)}\n- Precision: {_precision(facts.merged_config or {})}",
        *words.sparsity_notes(facts),
        "## Accuracy",
        _accuracy(facts),
        "## Is the merge exact?",
        *_verification(facts),
        "## Loading it",
        *_loading(facts.merged_config or {}, trust=facts.recipe.trust_remote_code),
        "## The recipe",
        f"```yaml\n{words.recipe_text(facts.recipe, full=False)}```",
        *([BASE_HEADING, base.text] if base.text else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merge_card(folder: Path, manifest: Mapping[str, Any], base: BaseCard) -> str:
    """Return the README.md of a folder that was merged by itself, outside a run: what its manifest knows.

    Args:
        folder: the merged folder.
        manifest: its manifest.
        base: the base model's own card, which is kept at the end.
    """
    config, result = read_json(folder / "config.json"), manifest["result"]
    weights = sum(layer["weights"] for layer in result["layers"])
    zeros = sum(layer["zeros"] for layer in result["layers"]) / weights
    name = Path(manifest["inputs"]["base"]["path"]).name
    front = {**base.licence, "library_name": "transformers", "tags": ["sqft"], "pipeline_tag": "text-generation"}
    exact = "to the nearest weight of its precision" if result["kind"] == "dense" else "exactly"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        MARK,
        f"# {name}, fine-tuned",
        f"An adapter of kind {result['kind']} is merged in {exact}. Made with sqft: one model, which needs no adapter "
        "and no sqft to run.",
        f"- Base model: `{name}`\n"
        f"- Sparsity: {words.percent_text(zeros)} of the weights of the adapted linears are zero\n"
        f"- Precision: {_precision(config)}",
        "## Is the merge exact?",
        "`sqft verify MERGED --base BASE --adapter ADAPTER` proves it; this card does not know whether that was done.",
        "## Loading it",
        *_loading(config, trust=False),
        *([BASE_HEADING, base.text] if base.text else []),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Facts, base: BaseCard) -> dict[str, Any]:
    tags = ["sqft", "compressed"]
    if facts.recipe.sparsify is not None and round(_zeros(facts) or 0, 4) > 0:
        tags.append("sparse")
    precision = stored_precision(facts.merged_config or {}) or ""
    if precision.startswith("INT"):
        tags.append(precision.lower())
    named = {"base_model": facts.recipe.model} if is_hub_id(facts.recipe.model) else {}
    return {**named, **base.licence, "library_name": "transformers", "tags": tags, "pipeline_tag": "text-generation"}


def is_hub_id(reference: str) -> bool:
    """Tell whether a model reference looks like 'owner/name' on the Hub, and is no folder or file here."""
    looks = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference) is not None
    return looks and not reference.endswith(".gguf") and not Path(reference).exists()


def _zeros(facts: Facts) -> float | None:
    return zeros_of("merged", facts.compressed[0] or "dense", facts.manifests)


def _sparsity(facts: Facts) -> str:
    zeros = _zeros(facts)
    if zeros is None or facts.recipe.sparsify is None:
        return "none was made by this recipe"
    return f"{words.percent_text(zeros)} of the weights of the targeted linears are zero"


def _precision(config: dict[str, Any]) -> str:
    method = (config.get("quantization_config") or {}).get("quant_method")
    return (stored_precision(config) or words.ABSENT) + (f", stored as {method}" if method else "")


def _accuracy(facts: Facts) -> str:
    if not facts.rows:
        return "This model was not evaluated."
    heads = ["model", *(words.column_title(facts, c) for c in facts.columns), "zeros", "precision", "weights"]
    rows = [
        [
            row.label + (" (earlier run)" if row.key == "baseline" else " (this model)" if row.key == "merged" else ""),
            *(words.score_text(row.scores.get(column)) for column in facts.columns),
            words.percent_text(row.zeros),
            row.precision or words.ABSENT,
            words.bytes_text(row.size_bytes),
        ]
        for row in facts.rows
    ]
    return f"{table(heads, rows)}\n\nValue ± one standard error over n rows. One seed."


def _verification(facts: Facts) -> list[str]:
    sentence = f"**{words.verdict(facts)[1]}**"
    checks = (facts.verify or {}).get("checks", [])
    rows = [
        [
            str(check["name"]).replace("_", " "),
            "passed" if check["passed"] else "**FAILED**",
            *(words.number_text(check.get(key)) for key in ("value", "bound")),
            str(check.get("detail") or ""),
        ]
        for check in checks
    ]
    return [sentence, table(["check", "result", "measured", "bound", "detail"], rows) if rows else ""]


def _loading(config: dict[str, Any], *, trust: bool) -> list[str]:
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") == "gptq":
        opens = "vLLM opens it as it is; transformers needs a package for GPTQ models besides."
    elif quantization:
        opens = "transformers opens it with the package `compressed-tensors` installed, vLLM as it is."
    else:
        opens = "An ordinary model folder without quantisation: transformers and vLLM open it as it is."
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'folder = "{FOLDER}"\ntokenizer = AutoTokenizer.from_pretrained(folder{_trust(trust)})\n'
        f'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{_trust(trust)})\n'
        'inputs = tokenizer("Question: ...", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
    )
    serve = f"vllm serve {FOLDER}{' --trust-remote-code' if trust else ''}"
    found = [opens, f"```python\n{code}\n```", f"```sh\n{serve}\n```"]
    if quantization:
        found.append(
            "On CPUs with AMX vLLM rounds activations to 8 bits for 4-bit models unless `VLLM_CPU_INT4_W4A8=0` is set: "
            "faster, but no longer the model that was verified."
        )
    return found


def _trust(trust: bool) -> str:
    return ", trust_remote_code=True" if trust else ""
