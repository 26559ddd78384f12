"""A LoRA that the user has already: merged by PEFT into the dense model, which is then compressed, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sqft.context import Context
from sqft.digests import digest_file
from sqft.errors import InputError
from sqft.pipeline import run
from sqft.recipe import FinetuneConfig, Recipe, TeacherConfig, load_recipe
from sqft.stages import teacher
from sqft.storage.checkpoint import Checkpoint

TOKENS = torch.arange(3, 27).reshape(2, 12)


def stock_adapter(model: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter as PEFT does, every part of it that is trained moved away from its start."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    adapted = get_peft_model(network, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **settings}))
    generator = torch.Generator().manual_seed(7)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    adapted.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(network: Any) -> torch.Tensor:
    found: torch.Tensor = network.eval()(input_ids=TOKENS).logits
    return found


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def merged_by_stock_peft(model: Path, adapter: Path) -> torch.Tensor:
    attached: Any = PeftModel.from_pretrained(opened(model), str(adapter))
    return logits(attached.merge_and_unload())


PLAIN = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", PLAIN),
        ("llama", {**PLAIN, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}, "use_rslora": True}),
        ("llama", {**PLAIN, "use_dora": True}),
        ("llama", {**PLAIN, "modules_to_save": ["lm_head", "input_layernorm"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {**PLAIN, "init_lora_weights": "pissa"}),
        ("qwen2", {"target_modules": "all-linear", "bias": "all"}),
        ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("gemma", {**PLAIN, "trainable_token_indices": [3, 9]}),
        ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("mixtral", {"target_modules": ["q_proj", "o_proj"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(list(value)[-2:]),
)
def test_the_folder_is_what_stock_peft_merges(
    arch: str, settings: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(arch, "bfloat16")
    adapter = stock_adapter(model, tmp_path / "adapter", **settings)
    made = teacher.run(model, adapter, str(model), tmp_path / "teacher", Context())
    found = logits(opened(made.path))
    assert torch.equal(found, merged_by_stock_peft(model, adapter))
    assert (found - logits(opened(model))).abs().max() > 0.05
    ours, theirs = Checkpoint(model).entries, Checkpoint(made.path).entries
    assert {n: (e.dtype, e.shape) for n, e in ours.items()} == {n: (e.dtype, e.shape) for n, e in theirs.items()}
    assert digest_file(model / "tokenizer.json") == digest_file(made.path / "tokenizer.json")
    assert made.manifest["stage"] == "teacher"
    assert made.manifest["result"]["tensors_changed"] > 0


REFUSED = [
    ({"target_modules": ["q_proj"], "lora_bias": True}, "llama", "the base layer has no bias"),
    ({"target_modules": ["q_proj"], "alora_invocation_tokens": [1, 2]}, "llama", "aLoRA does not support merging"),
    ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]}, "llama", "a model of other parameters"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "gemma", "ties to each other"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "gemma", "ties to each other"),
]


@pytest.mark.parametrize(("settings", "arch", "message"), REFUSED, ids=lambda value: str(value)[:12])
def test_what_peft_does_not_merge_is_refused_before_work(
    settings: dict[str, Any], arch: str, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(arch, "bfloat16")
    adapter = stock_adapter(model, tmp_path / "adapter", **settings)
    with pytest.raises(InputError, match=message):
        teacher.run(model, adapter, str(model), tmp_path / "teacher", Context())
    assert not (tmp_path / "teacher").exists()


def test_an_adapter_of_another_model_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", "bfloat16")
    others = {
        "wider": (tiny_model("llama", "bfloat16", intermediate_size=48), "size mismatch"),
        "deeper": (tiny_model("llama", "bfloat16", num_hidden_layers=3), "tensors that have no place in the model: 6"),
        "flatter": (tiny_model("llama", "bfloat16", num_hidden_layers=1), "adapt modules that it has no tensors of"),
        "phi": (tiny_model("gpt2", "bfloat16"), "not found in the base model"),
        "retrained": (shutil.copytree(model, tmp_path / "retrained"), r"whose model\.layers\.0\.self_attn\.q_proj"),
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    copy = Checkpoint(tmp_path / "retrained")
    copy.write(name, copy.read(name) * 2)
    for what, (other, message) in others.items():
        settings = {"target_modules": ["c_attn"]} if what == "phi" else PLAIN
        adapter = stock_adapter(other, tmp_path / f"of-{what}", **settings)
        with pytest.raises(InputError, match=message):
            teacher.run(model, adapter, str(model), tmp_path / "teacher", Context())
    assert not (tmp_path / "teacher").exists()


def test_a_hub_id_that_the_adapter_names_is_compared_with_the_recipes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", "bfloat16")
    adapter = stock_adapter(model, tmp_path / "adapter", **PLAIN)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "owner/One"}))
    with pytest.raises(InputError, match=r"was trained on owner/One, and the recipe's model is owner/other"):
        teacher.run(model, adapter, "owner/other", tmp_path / "teacher", Context())
    for reference in ("Owner/one", str(model)):  # the same, and a folder of which nothing is known
        teacher.run(model, adapter, reference, tmp_path / "teacher", Context())


def test_damaged_adapters_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama", "bfloat16")
    adapter = stock_adapter(model, tmp_path / "adapter", **PLAIN)
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            teacher.run(model, adapter, str(model), tmp_path / "teacher", Context())

    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * torch.nan}, weights)
    refused(r"NaN or Inf of \d+ values")
    weights.write_bytes(b"nothing")
    refused("cannot be read")
    weights.rename(adapter / "adapter_model.bin")
    refused("the pickle adapter_model.bin runs code")
    save_file(tensors, weights)
    config.write_text(json.dumps({**settings, "peft_type": "LOHA"}))
    refused("its peft_type is 'LOHA'; only LORA is taken")
    config.write_text(json.dumps({**settings, "peft_type": "SQFT", "kind": "sparse"}))
    refused("is of kind sparse, trained on a compressed base")
    config.unlink()
    refused(r"has no adapter_config\.json")


RECIPE = {
    "name": "mine",
    "threads": 1,
    "sparsify": {"calibration": {"samples": 4, "length": 32, "batch": 2}},
    "quantize": {"group_size": 16},
    "finetune": {
        "kind": "quantized", "ranks": [4], "lora_alpha": 8, "max_steps": 2, "length": 64, "batch": 2,
        "learning_rate": 0.02, "target_modules": ["q_proj", "down_proj"],
    },
    "verify": {"prompts": 2, "accuracy_rows": 2},
    "evaluate": {"batch": 4},
}  # fmt: skip


@pytest.fixture
def recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe file for a tiny model, sums, and an adapter that stock PEFT saved."""
    model, data = tiny_model("llama", "bfloat16"), tmp_path / "data"
    data.mkdir()
    for split, numbers in (("train", range(12)), ("test", range(12, 16))):
        rows = [{"prompt": f"{a} + 1 =", "completion": f" {a + 1}"} for a in numbers]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stock_adapter(model, tmp_path / "adapter", use_dora=True, **PLAIN)
    values = {**RECIPE, "model": str(model), "data": {"task": str(data)}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "teacher": {"adapter": str(tmp_path / "adapter")}}))
    return file


def test_a_lora_becomes_one_verified_compressed_model_with_its_accuracy_beside_it(recipe: Path, tmp_path: Path) -> None:
    out, made = tmp_path / "out", load_recipe(recipe)
    result = run(made, out)
    assert result.verified
    assert torch.equal(logits(opened(out / "teacher")), merged_by_stock_peft(Path(made.model), tmp_path / "adapter"))
    quantized = json.loads((out / "quantized" / "sqft" / "manifest.json").read_text())
    assert quantized["inputs"]["model"]["path"] == str(out / "teacher")
    rows = json.loads((out / "eval.json").read_text())["rows"]
    assert list(rows) == ["dense", "teacher", "quantized", "tuned", "merged"]
    text = (out / "report.md").read_text()
    assert "Dense + LoRA" in text
    assert "for Dense + LoRA, which was compressed" in text
    assert "There is no dense + LoRA row" not in text
    assert f"Tuned, before it was compressed, by: `{tmp_path / 'adapter'}`" in (out / "merged/README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    run(made, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    stock_adapter(Path(made.model), tmp_path / "adapter", **PLAIN)
    with pytest.raises(InputError, match=r"its input adapter .* has changed"):
        run(made, out)


def test_the_tuned_model_teaches_what_is_compressed_from_it(recipe: Path, tmp_path: Path) -> None:
    distilled = ["finetune.distill={hidden: 1}", "evaluate=null", "verify=null", "merge=null"]
    run(load_recipe(recipe, distilled), tmp_path / "out")
    inputs = json.loads((tmp_path / "out" / "adapter" / "sqft" / "manifest.json").read_text())["inputs"]
    paths = {name: Path(value["path"]).name for name, value in inputs.items()}
    assert paths == {"model": "quantized", "teacher": "teacher"}
    assert "without what is learnt from the teacher" in (tmp_path / "out" / "report.md").read_text()


def test_a_lora_is_compressed_without_training_and_without_rows(recipe: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of its own " * 40)
    nothing = ["finetune=null", "evaluate=null", "data.task=nowhere.jsonl", f"sparsify.calibration.data={text}"]
    result = run(load_recipe(recipe, nothing), tmp_path / "out")
    assert result.verified is None
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"teacher", "quantized"}


def test_a_tuned_model_is_compressed_where_it_lies(recipe: Path, tmp_path: Path) -> None:
    tuned = teacher.run(Path(load_recipe(recipe).model), tmp_path / "adapter", "m", tmp_path / "mine", Context()).path
    made = load_recipe(recipe, [f"teacher={{model: {tuned}}}", "quantize=null", "finetune.kind=sparse"])
    out = tmp_path / "out"
    assert run(made, out).verified
    assert not (out / "teacher").exists()
    assert json.loads((out / "sparse/sqft/manifest.json").read_text())["inputs"]["model"]["path"] == str(tuned)
    assert list(json.loads((out / "eval.json").read_text())["rows"])[:2] == ["dense", "teacher"]
    assert "Dense, tuned" in (out / "report.md").read_text()


def test_a_tuned_model_of_another_form_is_refused(
    recipe: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_model("llama", "bfloat16", intermediate_size=48)
    with pytest.raises(InputError, match=r"is not a tuned form of .*up_proj.weight is \[48, 32\]|\[48, 32\]"):
        run(load_recipe(recipe, [f"teacher={{model: {other}}}"]), tmp_path / "out")
    words = shutil.copytree(load_recipe(recipe).model, tmp_path / "words")
    file = words / "tokenizer.json"
    file.write_text(file.read_text().replace("<|user|>", "<|you|>"))
    with pytest.raises(InputError, match=r"its tokenizer differs in \d+ tokens"):
        run(load_recipe(recipe, [f"teacher={{model: {words}}}"]), tmp_path / "out")


def test_all_that_is_wrong_with_a_recipe_is_said_at_once(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="2 problems") as error:
        run(load_recipe(recipe, ["finetune.target_modules=[nothing]"]), tmp_path / "out")
    assert "cannot be read" in str(error.value)
    assert "target module 'nothing'" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adapter": "a", "model": "b"}, "has an adapter (a) and a model (b)"),
        ({"adapter": "a", "epochs": 1, "length": 64}, "a is there already and is not trained, so epochs, length would"),
        ({"adapter": "a", "compress": False, "epochs": 1}, "a is there already and is not trained, so epochs would"),
        ({"revision": "v1"}, "revision is v1, which only an adapter or a model has"),
        ({"ranks": [8, 4]}, "teacher.ranks: List should have at most 1 item"),
        ({"kind": "sparse"}, "teacher.kind: Input should be 'dense'"),
        ({"adapters": "a"}, "unknown key 'teacher.adapters'; did you mean 'adapter'?"),
    ],
)
def test_one_key_says_what_the_teacher_is(values: dict[str, Any], message: str, recipe: Path) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(recipe, [f"teacher={json.dumps(values)}"])
    assert message in str(error.value)


def test_a_recipe_holds_of_a_teacher_what_is_used(recipe: Path) -> None:
    given, trained = TeacherConfig(adapter="a"), TeacherConfig(max_steps=2, length=64)
    assert given.model_dump() == {"compress": True, "adapter": "a", "model": None, "revision": None}
    assert given.training is None
    assert trained.training == FinetuneConfig(kind="dense", ranks=[32], max_steps=2, length=64)
    assert not {"adapter", "model", "revision"} & trained.model_dump().keys()
    for teaching in (given, trained, None):
        made = load_recipe(recipe, ["teacher=null"]).model_copy(update={"teacher": teaching})
        assert Recipe(**made.model_dump()) == made


def test_the_tokenizer_is_that_of_what_is_compressed() -> None:
    dense, mine = Path("dense"), Path("mine")
    assert teacher.tuned_folder(TeacherConfig(model="mine"), dense, mine) == mine
    for config in (TeacherConfig(adapter="mine"), TeacherConfig(), TeacherConfig(model="mine", compress=False), None):
        assert teacher.tuned_folder(config, dense, mine) == dense
    assert teacher.locate(TeacherConfig(), dense) is None


TRAINED = {"ranks": [4], "max_steps": 3, "length": 64, "batch": 2, "learning_rate": 0.02, "evaluate_every": 2}


def test_the_dense_model_is_tuned_first_as_dense_and_lora_is(recipe: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", ["data.validation_rows=4"]
    made = load_recipe(recipe, [f"teacher={json.dumps(TRAINED)}", *more])
    assert run(made, out).verified
    assert list(json.loads((out / "eval.json").read_text())["rows"])[:3] == ["dense", "teacher", "quantized"]
    assert "by: a LoRA trained on the same data" in (out / "merged" / "README.md").read_text()
    report = (out / "report.md").read_text()
    assert "Dense + LoRA" in report
    assert "finetune the teacher" in report
    alone = json.dumps({**TRAINED, "kind": "dense"})
    nothing_else = ["teacher=null", "sparsify=null", "quantize=null", f"finetune={alone}", *more]
    run(load_recipe(recipe, nothing_else), tmp_path / "alone")
    weights = [folder / "model.safetensors" for folder in (out / "teacher", tmp_path / "alone" / "merged")]
    assert digest_file(weights[0]) == digest_file(weights[1])
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    run(made, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


@pytest.mark.parametrize("trains", [True, False])
def test_a_teacher_beside_what_is_compressed(trains: bool, recipe: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone"
    beside = {**(TRAINED if trains else {"adapter": str(tmp_path / "adapter")}), "compress": False}
    distilled = ["data.validation_rows=4", "finetune.distill={hidden: 1}"]
    assert run(load_recipe(recipe, [f"teacher={json.dumps(beside)}", *distilled]), out).verified
    run(load_recipe(recipe, ["teacher=null", "data.validation_rows=4", "finetune=null", "evaluate=null"]), alone)
    weights = [digest_file(folder / "quantized" / "model.safetensors") for folder in (out, alone)]
    assert weights[0] == weights[1], "the untuned model is what was compressed"
    rows = json.loads((out / "eval.json").read_text())["rows"]
    assert list(rows) == ["dense", "teacher", "quantized", "tuned", "merged"]
    text = (out / "report.md").read_text()
    assert "for Dense + LoRA" in text
    assert "which was compressed" not in text
    assert "before it was compressed" not in (out / "merged" / "README.md").read_text()
    learnt_from = json.loads((out / "adapter" / "sqft" / "manifest.json").read_text())["inputs"]["teacher"]["path"]
    assert Path(learnt_from) == out / "teacher"


def test_a_teacher_beside_nothing_is_refused(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"teacher\.compress is false, .* and nothing is"):
        load_recipe(recipe, ["teacher={compress: false}", "sparsify=null", "quantize=null", "finetune.kind=dense"])


def test_a_training_of_the_dense_model_that_cannot_be_is_refused_before_work(recipe: Path, tmp_path: Path) -> None:
    wrong = json.dumps({**TRAINED, "target_modules": ["nothing"], "length": 2})
    with pytest.raises(InputError, match="teacher: 2 problems") as error:
        run(load_recipe(recipe, [f"teacher={wrong}"]), tmp_path / "out")
    assert "target module 'nothing'" in str(error.value)
    assert "examples are longer than a row of 2 tokens" in str(error.value)
    sparse = ["teacher=null", "quantize=null", "finetune=null", "evaluate=null"]
    run(load_recipe(recipe, sparse), tmp_path / "pruned")
    masked = [f"model={tmp_path / 'pruned' / 'sparse'}", f"teacher={json.dumps(TRAINED)}"]
    with pytest.raises(InputError, match="has a mask, and a dense LoRA would fill its zeros"):
        run(load_recipe(recipe, masked), tmp_path / "out")


def test_an_adapter_that_is_nowhere(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter \./gone: no such folder"):
        run(load_recipe(recipe, ["teacher.adapter=./gone"]), tmp_path / "out")
    with pytest.raises(InputError, match="revision is main, which only an adapter of the Hub has"):
        run(load_recipe(recipe, ["teacher.revision=main"]), tmp_path / "out")
