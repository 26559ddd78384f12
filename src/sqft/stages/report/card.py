"""`merged/README.md`: the model card that a merged folder is published with.

The card is written after the folder was finished and is no part of what the folder's manifest records, so writing it
changes no digest and no key. A card that the base model brought along is kept below ours. The manifest tells the base's
card (it has its digest), a mark tells ours; any other README.md is the user's and is left alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from sqft.core.blocks import BLOCK
from sqft.digests import digest_file
from sqft.disk import read_json
from sqft.errors import InputError
from sqft.model.sources import is_hub_id
from sqft.pages.blocks import Badge, Block, Code, Items, Page, Section, Text
from sqft.pages.render import form
from sqft.pages.text import ABSENT, model_name, percent_text
from sqft.stages.report import sections, words
from sqft.stages.report.models import stored_precision, zeros_of
from sqft.storage.integers import parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqft.stages.report.facts import Facts
    from sqft.storage.scheme import Scheme

CARD = "README.md"
MARK = "<!-- Written by sqft report, which writes it anew unless this line is removed. -->"
BASE_HEADING = "## The base model's own card"
FOLDER = "path/to/this/folder"
_MADE = "Made with sqft: one model, which needs no adapter and no sqft to run."
_OPENS = {
    "gptq": "vLLM opens it as it is; transformers needs a package for GPTQ models besides.",
    "integers": "transformers opens it with the package `compressed-tensors` installed, vLLM as it is.",
    "float": "An ordinary model folder without quantisation: transformers and vLLM open it as it is.",
}
_ROUNDED = (
    "On CPUs with AMX vLLM rounds activations to 8 bits for 4-bit models unless `VLLM_CPU_INT4_W4A8=0` is set: "
    "faster, but no longer the model that was verified."
)
_GGUF = (
    "llama.cpp and Ollama run it from a GGUF file that holds the same weights to the bit. Do not run `llama-quantize` "
    "on that file: it would round them again."
)
_OPENVINO = "OpenVINO runs it from a folder that holds the same weights to the bit, where it knows the architecture."
_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"{trust})
inputs = tokenizer("Question: ...", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"""


class BaseCard(NamedTuple):
    """The base model's card: its licence fields, which hold for what is made from it too, and its text below them."""

    licence: Mapping[str, str] = {}
    text: str = ""


def base_card(folder: Path, manifest: Mapping[str, Any]) -> BaseCard | None:
    """Return the base's card as a merged folder has it, alone or in an earlier card of ours.

    Args:
        folder: the merged folder.
        manifest: its manifest.

    Returns:
        An empty card if the base brought none; None if the folder's README.md is the user's, to be left alone.
    """
    path = folder / CARD
    if not path.is_file():
        return BaseCard()
    front, text = _split(path.read_text(encoding="utf-8-sig", errors="replace"))
    if manifest.get("files", {}).get(CARD) != digest_file(path):
        ours, _, text = text.partition(f"\n{BASE_HEADING}\n")
        if MARK not in ours:
            return None
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


def model_card(facts: Facts, base: BaseCard) -> str:
    """Return the README.md of a run's merged model, the base model's own card at its end."""
    recipe, config, zeros = facts.recipe, facts.merged_config, zeros_of("merged", facts.manifests)
    sparse = recipe.sparsify is not None and zeros is not None
    limit = f", at most {recipe.data.train_limit:,} training rows" if recipe.data.train_limit else ""
    taught = recipe.teacher
    tuned = taught and taught.compress and (f"`{taught.given}`" if taught.given else "a LoRA trained on the same data")
    about = [
        f"Base model: `{recipe.model}`",
        *([f"Tuned, before it was compressed, by: {tuned}"] if tuned else []),
        f"Data: `{recipe.data.task}`{limit}",
        f"Sparsity: {_sparsity(zeros, 'targeted') if sparse else 'none was made by this recipe'}",
        f"Precision: {_precision(config)}",
    ]
    lead = [f"{words.headline(facts)} {_MADE}", recipe.note]
    accuracy: list[Block] = [Text("This model was not evaluated.")]
    if facts.models:
        accuracy = [sections.results_table(facts, this="merged"), Text("One seed.")]
    proof: list[Block] = [Badge(*words.verdict(facts)), *(sections.verification(facts) if facts.verify else [])]
    parts = [
        Section("accuracy", "Accuracy", accuracy),
        Section("verification", "Is the merge exact?", proof),
        _loading(config, trust=recipe.trust_remote_code),
        Section("recipe", "The recipe", [Code(words.recipe_text(recipe, full=False), "yaml")]),
    ]
    head: list[Block] = [*map(Text, lead), Items(about), *map(Text, words.sparsity_notes(facts))]
    tags = ["compressed", *(["sparse"] if sparse and round(zeros or 0, 4) > 0 else [])]
    precision = stored_precision(config) or ""
    tags += [precision.lower()] if precision.startswith("INT") else []
    named = {"base_model": recipe.model} if is_hub_id(recipe.model) else {}
    return _card(Page(f"{model_name(recipe.model)} on {recipe.data.task}", parts, head), base, tags, named)


def merge_card(folder: Path, manifest: Mapping[str, Any], base: BaseCard) -> str:
    """Return the README.md of a folder that was merged by itself, outside a run: what its manifest knows."""
    config, result = read_json(folder / "config.json"), manifest["result"]
    zeros, weights = (sum(layer[key] for layer in result["layers"]) for key in ("zeros", "weights"))
    name = Path(manifest["inputs"]["base"]["path"]).name
    exact = "to the nearest weight of its precision" if result["kind"] == "dense" else "exactly"
    about = [
        f"Base model: `{name}`",
        f"Sparsity: {_sparsity(zeros / weights, 'adapted')}",
        f"Precision: {_precision(config)}",
    ]
    proof = (
        "`sqft verify MERGED --base BASE --adapter ADAPTER` proves it; this card does not know whether that was done."
    )
    parts = [Section("verification", "Is the merge exact?", [Text(proof)]), _loading(config, trust=False)]
    head: list[Block] = [Text(f"An adapter of kind {result['kind']} is merged in {exact}. {_MADE}"), Items(about)]
    return _card(Page(f"{name}, fine-tuned", parts, head), base)


def _card(page: Page, base: BaseCard, tags: Sequence[str] = (), named: Mapping[str, str] = {}) -> str:
    front = {**named, **base.licence, "library_name": "transformers", "tags": ["sqft", *tags]}
    front["pipeline_tag"] = "text-generation"
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return form("card.md.j2", page=page, front=text, mark=MARK, heading=BASE_HEADING, base=base.text)


def _sparsity(zeros: float | None, which: str) -> str:
    return f"{percent_text(zeros)} of the weights of the {which} linears are zero"


def _precision(config: Mapping[str, Any]) -> str:
    method = (config.get("quantization_config") or {}).get("quant_method")
    return (stored_precision(config) or ABSENT) + (f", stored as {method}" if method else "")


def _loading(config: Mapping[str, Any], *, trust: bool) -> Section:
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    opens = _OPENS["gptq" if method == "gptq" else "integers" if quantization else "float"]
    code = _CODE.format(folder=FOLDER, trust=", trust_remote_code=True" if trust else "")
    serve = f"vllm serve {FOLDER}{' --trust-remote-code' if trust else ''}"
    blocks: list[Block] = [Text(opens), Code(code, "python"), Code(serve, "sh")]
    if quantization:
        blocks.append(Text(_ROUNDED))
    scheme = _scheme(quantization)
    if scheme is not None and _fits_gguf(scheme):
        blocks += [Text(_GGUF), Code(f"sqft export {FOLDER} model.gguf", "sh")]
    if scheme is not None and _fits_openvino(scheme):
        blocks += [Text(_OPENVINO), Code(f"sqft export {FOLDER} openvino --format openvino", "sh")]
    return Section("loading", "Loading it", blocks)


def _scheme(quantization: dict[str, Any]) -> Scheme | None:
    try:
        return parse_scheme(quantization, "")
    except InputError:
        return None


def _fits_gguf(scheme: Scheme) -> bool:
    """Tell whether the grid is one of those that GGUF has a type for; the scales' values decide the rest."""
    return (scheme.group_size or BLOCK) % BLOCK == 0 and (scheme.symmetric or scheme.bits < 8)


def _fits_openvino(scheme: Scheme) -> bool:
    """Tell whether OpenVINO takes the integers as they are."""
    return scheme.format == "compressed-tensors" and scheme.bits == 4 and scheme.group_size is not None
