"""finetune, extract, merge, verify on tiny models: numbers agree, damage is found, interruptions cost nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from sqft.adapters.attach import load_model
from sqft.adapters.config import SqftConfig
from sqft.adapters.saved import SavedAdapter
from sqft.artifact import Artifact
from sqft.context import Context
from sqft.core.bfloat16 import multiplies_bfloat16
from sqft.data.tasks import Example, Task
from sqft.digests import digest_file, file_digests
from sqft.errors import InputError, NumericalError
from sqft.evaluation import prepacked
from sqft.model.opening import load_tokenizer
from sqft.model.targets import skeleton
from sqft.recipe import FinetuneConfig, MergeConfig, SearchConfig, SparsifyConfig, VerifyConfig
from sqft.stages import extract, finetune, merge, sparsify, verify
from sqft.stages.finetune import loop
from sqft.stages.verify import behaviour
from sqft.storage.checkpoint import Checkpoint

PAIRS = [(f"Question: {a} + {b}?\nAnswer:", f" {a + b}") for a in range(6) for b in range(6)]
EXAMPLES = [Example(prompt, answer) for prompt, answer in PAIRS[:8]]
TASK = Task("sums", "exact")
TOKENS = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(0))
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "mixtral": ["q_proj", "v_proj"],
}


def training(**options: Any) -> FinetuneConfig:
    values = {
        "ranks": [4, 2], "lora_alpha": 8, "max_steps": 6, "length": 128, "batch": 2, "learning_rate": 0.02,
        "save_every": 2, "target_modules": TARGETS["llama"], **options,
    }  # fmt: skip
    return FinetuneConfig.model_validate(values)


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run sparsify, finetune, extract and (where it may) merge, once; return the folder that holds them."""
    known: dict[str, Path] = {}

    def make(arch: str, dtype: str, **options: Any) -> Path:
        key = f"{arch} {dtype} {sorted(options.items())}"
        if key in known:
            return known[key]
        out = tmp_path_factory.mktemp("chain")
        settings = SparsifyConfig.model_validate({"calibration": {"batch": 4}})
        sparsify.run(settings, tiny_model(arch, dtype), TOKENS, out / "sparse", Context())
        config = training(target_modules=TARGETS[arch], **options)
        finetune.run(config, out / "sparse", PAIRS, PAIRS[:4], out / "adapter", Context(), data={})
        extract.run(SearchConfig(), out / "adapter", out / "sub_adapter", Context())
        if config.kind == "sparse":
            merge.run(MergeConfig(), out / "sparse", out / "sub_adapter", out / "merged", Context())
        known[key] = out
        return out

    return make


@pytest.fixture
def chain(made: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The folder of `made`, copied: what a test changes is its own."""

    def make(arch: str = "llama", dtype: str = "bfloat16", **options: Any) -> Path:
        shutil.copytree(made(arch, dtype, **options), tmp_path, dirs_exist_ok=True)
        return tmp_path

    return make


def prove(out: Path, name: str = "verify.json", **options: Any) -> dict[str, Any]:
    checks = VerifyConfig(prompts=4, accuracy_rows=4, **options)
    return verify.run(
        checks, out / "merged", out / "sparse", out / "sub_adapter", out / name, Context(), task=TASK, examples=EXAMPLES
    )


def test_both_models_are_proved_on_stock_linears(chain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a reordered weight: its product need not have the bits of the other model's")

    out = chain("llama", "bfloat16")
    monkeypatch.setattr(prepacked, "_form", lambda: fail)
    assert prove(out)["passed"]


CHAINS = [
    ("llama", "bfloat16"), ("llama", "float32"), ("phi3", "float32"), ("gpt2", "bfloat16"), ("mixtral", "bfloat16")
]  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype"), CHAINS)
def test_the_whole_chain_verifies(arch: str, dtype: str, chain: Callable[..., Path]) -> None:
    out = chain(arch, dtype)
    result = prove(out)
    assert result["passed"], result["checks"]
    names = ["zeros_kept", "weights_equal", "rest_untouched", "adapter_applied", "all_finite", "logits_equal"]
    assert [check["name"] for check in result["checks"]] == [*names, "accuracy_equal"]
    assert all(check["value"] == 0 for check in result["checks"])
    log = json.loads((out / "adapter" / "sqft" / "training_log.json").read_text())
    assert len(log["train"]) == 6
    assert log["train"][-1]["loss"] < log["train"][0]["loss"]
    assert not (out / "adapter" / ".checkpoints").exists()
    as_stored = multiplies_bfloat16() or torch.cuda.is_available()
    computes_in = dtype if as_stored else "float32"
    assert Artifact.open(out / "adapter").manifest["result"]["computes_in"] == computes_in
    assert Artifact.open(out / "merged").manifest["result"]["filled_zeros"] == 0


def test_transformers_opens_merged_folders_without_us(made: Callable[..., Path]) -> None:
    script = (
        "import sys, torch, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    assert model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()\n"
        "assert 'sqft' not in sys.modules"
    )
    folders = [str(made(*pair) / "merged") for pair in CHAINS]
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def damage(out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    checkpoint = Checkpoint(out / "merged")
    checkpoint.write(name, change(checkpoint.read(name)))
    # As a folder without a manifest; with one it is refused before any check.
    (out / "merged" / "sqft" / "manifest.json").unlink(missing_ok=True)


def fill_zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(weight == 0, torch.full_like(weight, 0.1), weight)


@pytest.mark.parametrize(
    ("weight", "change", "fails"),
    [
        ("self_attn.q_proj", fill_zeros, {"zeros_kept", "weights_equal", "logits_equal"}),
        ("self_attn.o_proj", fill_zeros, {"zeros_kept", "rest_untouched", "logits_equal"}),
        ("mlp.up_proj", lambda w: w * 1.5, {"weights_equal", "logits_equal"}),
        ("input_layernorm", lambda w: w + 1, {"rest_untouched", "logits_equal"}),
        ("self_attn.q_proj", lambda w: w * float("nan"), {"zeros_kept", "weights_equal", "all_finite"}),
        ("input_layernorm", lambda w: w * float("inf"), {"rest_untouched", "all_finite"}),
    ],
)  # fmt: skip
def test_a_damaged_merge_fails(
    weight: str, change: Callable[[torch.Tensor], torch.Tensor], fails: set[str], chain: Callable[..., Path]
) -> None:
    out = chain()
    damage(out, f"model.layers.1.{weight}.weight", change)
    result = prove(out)
    assert not result["passed"]
    assert fails <= {check["name"] for check in result["checks"] if not check["passed"]}
    named = [check["detail"] for check in result["checks"] if check["name"] in fails - {"logits_equal"}]
    assert all(f"model.layers.1.{weight}" in detail for detail in named)


def test_an_old_proof_does_not_pass_a_changed_model(chain: Callable[..., Path]) -> None:
    out = chain()
    assert prove(out)["passed"]
    inputs = json.loads((out / "verify.json").read_text())["made_from"]["inputs"]
    assert inputs["merged"]["bytes"] >= (out / "merged" / "model.safetensors").stat().st_size
    checkpoint = Checkpoint(out / "merged")
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoint.write(name, checkpoint.read(name) * 1.5)
    with pytest.raises(
        InputError, match=r"merged is no longer what .*manifest.json says .*model.safetensors has changed"
    ):
        prove(out)
    manifest = out / "merged" / "sqft" / "manifest.json"
    kept = manifest.read_text()
    manifest.unlink()
    with pytest.raises(InputError, match=r"verify.json belongs to another recipe.*its input merged .* has changed"):
        prove(out)
    assert not prove(out, "anew.json")["passed"]
    # Neither does one whose manifest was changed with it.
    values = json.loads(kept)
    values["files"]["model.safetensors"] = digest_file(out / "merged" / "model.safetensors")
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"manifest\.json contradicts itself"):
        prove(out)


def test_files_beside_the_weights_are_part_of_the_proof(chain: Callable[..., Path]) -> None:
    out = chain()
    (out / "merged" / "sqft" / "manifest.json").unlink()
    assert prove(out)["passed"]
    template = out / "merged" / "chat_template.jinja"
    template.write_text(template.read_text() + "Be brief.")
    (rest,) = [check for check in prove(out, "anew.json")["checks"] if not check["passed"]]
    assert rest["name"] == "rest_untouched" and "chat_template.jinja" in rest["detail"]


def test_a_merge_that_did_nothing_fails(chain: Callable[..., Path]) -> None:
    out = chain()
    base = Checkpoint(out / "sparse")
    for name in base.entries:
        damage(out, name, lambda w, name=name: base.read(name))
    failed = {check["name"] for check in prove(out)["checks"] if not check["passed"]}
    assert {"weights_equal", "adapter_applied", "logits_equal"} <= failed


def test_wrong_answers_fail_the_accuracy_check(chain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    out = chain()
    answers = iter([[True, True, False, True], [True, False, False, True]])
    monkeypatch.setattr(behaviour, "score_examples", lambda *a, **k: next(answers))
    (check,) = [c for c in prove(out)["checks"] if not c["passed"]]
    assert check["name"] == "accuracy_equal"
    assert check["detail"] == "3 of 4 right unmerged, 2 merged, 1 answers differ"


def test_a_dense_sub_adapter_is_the_live_one_in_stock_peft(chain: Callable[..., Path]) -> None:
    out = chain(dtype="float32", kind="dense", ranks=[4, 3, 2])
    saved = SavedAdapter.open(out / "sub_adapter")
    assert saved.kind == "dense"
    assert {low.rank for low in saved.modules.values()} == {3}
    assert {round(low.scaling, 9) for low in saved.modules.values()} == {2.0}
    from sqft.adapters.elastic import rank_space, set_ranks

    super_adapter = PeftModel.from_pretrained(
        load_model(out / "sparse"), out / "adapter", config=_elastic_config(out)
    ).eval()
    set_ranks(super_adapter, rank_space(super_adapter).heuristic())
    stock = PeftModel.from_pretrained(load_model(out / "sparse"), out / "sub_adapter").eval()
    with torch.no_grad():
        assert torch.allclose(stock(TOKENS).logits, super_adapter(TOKENS).logits, atol=1e-6)


def _elastic_config(out: Path) -> SqftConfig:
    config = SqftConfig(
        kind="dense", ranks=[4, 3, 2], lora_alpha=8, target_modules=TARGETS["llama"], task_type="CAUSAL_LM"
    )
    config.base_model_name_or_path = str(out / "sparse")
    return config


@pytest.mark.parametrize(("strategy", "rank"), [("heuristic", 4), ("maximal", 4), ("minimal", 2)])
def test_extract_slices_and_keeps_the_scaling(strategy: Any, rank: int, chain: Callable[..., Path]) -> None:
    out = chain()
    extract.run(SearchConfig(strategy=strategy), out / "adapter", out / strategy, Context())
    whole, part = SavedAdapter.open(out / "adapter"), SavedAdapter.open(out / strategy)
    assert part.kind == "sparse"
    for name, low in part.modules.items():
        assert low.rank == rank
        assert low.scaling == whole.modules[name].scaling
        assert torch.equal(low.lora_A, whole.modules[name].lora_A[:rank])
        assert torch.equal(low.lora_B, whole.modules[name].lora_B[:, :rank])


def test_extract_from_a_file_of_ranks(chain: Callable[..., Path]) -> None:
    out = chain()
    space = SavedAdapter.open(out / "adapter").rank_space()
    ranks = {group: (2 if "layers.0" in group else 4) for group in space.groups}
    (out / "ranks.json").write_text(json.dumps(ranks))
    options = SearchConfig(strategy="file", ranks_file=str(out / "ranks.json"))
    extract.run(options, out / "adapter", out / "chosen", Context())
    for name, low in SavedAdapter.open(out / "chosen").modules.items():
        assert low.rank == (2 if "layers.0" in name else 4)
    # The folder loads with its ranks, and merges to what it is live.
    merge.run(MergeConfig(), out / "sparse", out / "chosen", out / "merged_chosen", Context())
    live, merged = load_model(out / "sparse", out / "chosen"), load_model(out / "merged_chosen")
    with torch.no_grad():
        assert torch.equal(live(TOKENS).logits, merged(TOKENS).logits)
    (out / "ranks.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="has no rank"):
        extract.run(options, out / "adapter", out / "empty", Context())


def test_a_dense_adapter_is_not_merged_into_a_sparse_base_unasked(chain: Callable[..., Path]) -> None:
    out = chain(kind="dense")
    with pytest.raises(InputError, match=r"50\.0 % sparsity lost.*merge\.allow_sparsity_loss"):
        merge.run(MergeConfig(), out / "sparse", out / "sub_adapter", out / "merged", Context())
    assert not (out / "merged").exists()
    artifact = merge.run(
        MergeConfig(allow_sparsity_loss=True), out / "sparse", out / "sub_adapter", out / "merged", Context()
    )
    assert artifact.manifest["result"]["filled_zeros"] > 1000
    result = {check["name"]: check for check in prove(out)["checks"]}
    assert not result["zeros_kept"]["passed"]
    assert result["weights_equal"]["passed"]


def test_a_dense_adapter_merges_where_nothing_was_pruned(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The mask file alone is no reason: a base that was pruned elsewhere loses none of its zeros."""
    settings = SparsifyConfig.model_validate({"targets": ["mlp.*"], "calibration": {"batch": 4}})
    sparsify.run(settings, tiny_model("llama", "bfloat16"), TOKENS, tmp_path / "sparse", Context())
    config = training(kind="dense", ranks=[4], target_modules=["q_proj"])
    finetune.run(config, tmp_path / "sparse", PAIRS, [], tmp_path / "adapter", Context(), data={})
    merge.run(MergeConfig(), tmp_path / "sparse", tmp_path / "adapter", tmp_path / "merged", Context())
    name = "model.layers.0.mlp.up_proj.weight"
    assert (Checkpoint(tmp_path / "merged").read(name) == 0).any()


def test_an_adapter_of_another_base_is_refused(chain: Callable[..., Path], tiny_model: Callable[..., Path]) -> None:
    out = chain()
    with pytest.raises(InputError, match="was trained on another base"):
        merge.run(MergeConfig(), tiny_model("llama", "bfloat16"), out / "sub_adapter", out / "wrong", Context())
    with pytest.raises(InputError, match="was trained on another base"):
        load_model(tiny_model("llama", "bfloat16"), out / "sub_adapter")


def test_a_foreign_lora_merges_and_one_with_more_than_factors_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tiny_model("llama")
    model = get_peft_model(
        load_model(folder),
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "lora")
    merge.run(MergeConfig(), folder, tmp_path / "lora", tmp_path / "merged", Context())
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        assert torch.allclose(load_model(tmp_path / "merged")(TOKENS).logits, expected, atol=1e-4)
        assert not torch.allclose(load_model(folder)(TOKENS).logits, expected, atol=1e-2)
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(InputError, match="init_lora_weights: pissa, which rewrites the base's weights"):
        merge.run(MergeConfig(), folder, tmp_path / "lora", tmp_path / "other", Context())
    model = get_peft_model(load_model(folder), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "more")
    with pytest.raises(InputError, match="it has modules_to_save, which is not merged into a linear"):
        merge.run(MergeConfig(), folder, tmp_path / "more", tmp_path / "merged2", Context())


@pytest.mark.parametrize(
    ("options", "pairs", "message"),
    [
        ({"target_modules": ["nothing"]}, PAIRS, "target module 'nothing' matches no linear of the model; it has"),
        ({"length": 16}, PAIRS, r"36 of 36 examples are longer than a row of 16 tokens \(the longest has"),
        ({"length": 1024}, PAIRS, "1024 tokens, more than the 512 that the model allows"),
        ({}, [], "there are no training examples"),
        ({"trackers": ["trackio"]}, PAIRS, "trackers has trackio, which is not installed"),
        ({"kind": "quantized"}, PAIRS, "needs a quantised base"),
    ],
)
def test_bad_training_input_is_refused_before_work(
    options: dict[str, Any], pairs: Any, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        finetune.run(training(**options), tiny_model("llama"), pairs, [], tmp_path / "adapter", Context(), data={})
    assert not list(tmp_path.iterdir())


def test_what_training_cannot_do_is_refused_before_it(tiny_model: Callable[..., Path]) -> None:
    config = training(attention="flash_attention_2", target_modules=["q_proj", "lm_head"])
    with pytest.raises(InputError, match="2 problems") as error:
        finetune.check(config, skeleton(tiny_model("llama")))
    assert "set batch: 1 and accumulation: 2" in str(error.value)
    assert "'lm_head' names lm_head, outside the decoder's blocks" in str(error.value)


def test_training_that_diverges_says_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    config = training(kind="dense", learning_rate=1e30, max_grad_norm=1e30, schedule="constant", warmup=0)
    with pytest.raises(NumericalError, match=r"diverged.*lower finetune\.learning_rate"):
        finetune.run(config, tiny_model("llama"), PAIRS, [], tmp_path / "adapter", Context(), data={})
    assert not (tmp_path / "adapter").exists()


def test_killed_after_the_last_step_it_takes_no_other(
    chain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = chain(schedule="constant", max_steps=5, save_every=5)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    config = training(schedule="constant", max_steps=5, save_every=5)
    arguments: Any = (config, out / "sparse", PAIRS, PAIRS[:4], tmp_path / "again")
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "check_trained", kill)
        with pytest.raises(KeyboardInterrupt):
            finetune.run(*arguments, Context(), data={})
    again = finetune.run(*arguments, Context(), data={})
    whole = Artifact.open(out / "adapter")
    assert again.manifest["result"]["resumed_at_step"] == again.manifest["result"]["steps"] == 5
    assert again.manifest["result"]["final_loss"] == whole.manifest["result"]["final_loss"]
    assert again.manifest["files"]["adapter_model.safetensors"] == whole.manifest["files"]["adapter_model.safetensors"]


@pytest.mark.parametrize(("stored", "named"), [("float32", "bfloat16"), ("float16", "float32")])
def test_the_dtype_is_that_of_the_weights_whatever_the_config_says(
    stored: str, named: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama", stored), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "dtype": named}))
    assert load_model(folder).dtype == getattr(torch, stored)
    settings = SparsifyConfig.model_validate({"calibration": {"batch": 4}})
    sparsify.run(settings, folder, TOKENS, tmp_path / "sparse", Context())
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["dtype"] == stored


def test_a_sub_adapter_is_no_super_adapter(chain: Callable[..., Path], tmp_path: Path) -> None:
    out = chain(kind="dense")
    ranks = SavedAdapter.open(out / "adapter").rank_space().heuristic()
    first, *_ = ranks
    (tmp_path / "ranks.json").write_text(json.dumps({**ranks, first: 2}))
    mixed = SearchConfig(strategy="file", ranks_file=str(tmp_path / "ranks.json"))
    extract.run(mixed, out / "adapter", tmp_path / "mixed", Context())
    with pytest.raises(InputError, match="have ranks 2, 4"):
        extract.run(SearchConfig(), tmp_path / "mixed", tmp_path / "again", Context())


@pytest.mark.parametrize(
    ("length", "bfloat16", "kernel"),
    [(256, True, "eager"), (256, False, "sqft_by_example"), (257, True, "sqft_by_example")],
)
def test_long_rows_attend_example_by_example_on_a_cpu(
    length: int,
    bfloat16: bool,
    kernel: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU it is transformers' choice")
    seen: list[str] = []
    train = loop.PackedTrainer.train

    def watched(trainer: Any, *args: Any, **options: Any) -> Any:
        seen.append(trainer.model.get_base_model().config._attn_implementation)
        return train(trainer, *args, **options)

    monkeypatch.setattr(loop.PackedTrainer, "train", watched)
    monkeypatch.setattr(finetune, "multiplies_bfloat16", lambda: bfloat16)
    config = training(kind="dense", length=length, max_steps=1)
    finetune.run(config, tiny_model("llama"), PAIRS, [], tmp_path / "adapter", Context(), data={})
    assert seen == [kernel]


def test_logits_that_are_no_numbers_are_not_equal(chain: Callable[..., Path]) -> None:
    out = chain()
    # The 3 stands in the last of the four prompts alone.
    three = torch.tensor([load_tokenizer(out / "merged").convert_tokens_to_ids("3")])
    damage(out, "model.embed_tokens.weight", lambda w: w.clone().index_fill_(0, three, float("nan")))
    checks = {check["name"]: check for check in prove(out)["checks"]}
    assert not checks["all_finite"]["passed"]
    assert "model.embed_tokens.weight" in checks["all_finite"]["detail"]
    assert "logits_equal" not in checks  # no distance means anything


def test_checkpointing_accumulation_and_unpacked_rows_train_alike(chain: Callable[..., Path]) -> None:
    out = chain(dtype="float32", packing=False, batch=4, max_steps=3)
    plain = load_file(out / "adapter" / "adapter_model.safetensors")
    for name, options in {
        "recomputed": {"gradient_checkpointing": True, "batch": 4},
        "accumulated": {"accumulation": 2, "batch": 2},
    }.items():
        settings = training(packing=False, max_steps=3, **options)
        finetune.run(settings, out / "sparse", PAIRS, [], out / name, Context(), data={})
        found = load_file(out / name / "adapter_model.safetensors")
        assert all(torch.allclose(plain[key], found[key], atol=2e-3) for key in plain), name


def test_the_base_is_untouched_and_validation_loss_is_logged(chain: Callable[..., Path]) -> None:
    out = chain(evaluate_every=3)
    log = json.loads((out / "adapter" / "sqft" / "training_log.json").read_text())
    assert [entry["step"] for entry in log["eval"]] == [3, 6]
    manifest = Artifact.open(out / "sparse").manifest
    found = file_digests(out / "sparse")
    assert manifest["files"] == {name: found[name] for name in found if name != "sqft/manifest.json"}


def test_unfinished_training_of_another_recipe_is_refused(chain: Callable[..., Path], tmp_path: Path) -> None:
    out = chain(max_steps=1)
    partial = out / ".partial-other"
    shutil.copytree(out / "adapter", partial)
    (partial / ".checkpoints").mkdir()
    (partial / ".checkpoints" / "step").touch()
    description = {k: Artifact.open(out / "adapter").manifest[k] for k in ("stage", "config", "inputs", "seed")}
    (partial / "sqft" / "description.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"(?s)belongs to another recipe.*learning_rate was 0\.02, is now 0\.5"):
        finetune.run(
            training(max_steps=1, learning_rate=0.5), out / "sparse", PAIRS, [], out / "other", Context(), data={}
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_dense_merge_is_as_close_as_its_precision(
    dtype: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("llama", dtype)
    config = training(kind="dense", ranks=[4], lora_alpha=64)
    finetune.run(config, base, PAIRS, [], tmp_path / "adapter", Context(), data={})
    merge.run(MergeConfig(), base, tmp_path / "adapter", tmp_path / "merged", Context())

    def prove_it(name: str, **options: Any) -> dict[str, Any]:
        checks = VerifyConfig.model_validate({"prompts": 4, "accuracy_rows": 4, **options})
        file = tmp_path / name
        return verify.run(
            checks, tmp_path / "merged", base, tmp_path / "adapter", file, Context(), task=TASK, examples=EXAMPLES
        )

    result = prove_it("verify.json")
    close = next(check for check in result["checks"] if check["name"] == "logits_close")
    assert result["passed"], result["checks"]
    assert 0 < close["value"] < 1
    # A bound that the user gives is the one that holds.
    strict = next(c for c in prove_it("strict.json", logit_bound=1e-12)["checks"] if c["name"] == "logits_equal")
    assert strict["bound"] == 1e-12
    assert not strict["passed"]
    # A weight that is off by more than rounding is seen in the logits too.
    checkpoint = Checkpoint(tmp_path / "merged")
    name = "model.layers.0.mlp.down_proj.weight"
    checkpoint.write(name, checkpoint.read(name) * 1.25)
    (tmp_path / "merged" / "sqft" / "manifest.json").unlink()
    assert "logits_close" in {c["name"] for c in prove_it("off.json", prompts=3)["checks"] if not c["passed"]}


def test_a_float16_base_trains_on_true_gradients(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from sqft.training import loss as steps
    from sqft.training.loss_scale import LossScale

    # As many tokens as a real step has: their mean's gradients are below what float16 holds.
    losses = {}
    for dtype in ("float16", "float32"):
        config = training(kind="dense", ranks=[4])
        model = load_model(tiny_model("llama", dtype))
        torch.manual_seed(0)
        adapted = finetune.attach(model, config)
        scale = LossScale(adapted, float16=dtype == "float16")
        ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32).expand(2, 32)}
        steps.answer_loss(adapted, inputs, 2_000_000, scale.amplify).backward()
        losses[dtype] = torch.cat([p.grad.flatten() for n, p in adapted.named_parameters() if "lora_B" in n])
    wanted = losses["float32"]
    assert wanted.abs().max() < 6e-5  # float16's smallest normal number
    assert (losses["float16"] - wanted).norm() < 0.05 * wanted.norm()


def test_a_step_that_overflows_float16_is_skipped_and_the_scale_is_resumed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from sqft.training.loss_scale import LossScale

    adapted = finetune.attach(load_model(tiny_model("llama", "float16")), training(kind="dense", ranks=[4]))
    scale = LossScale(adapted, float16=True)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    state = TrainerState(global_step=3, is_world_process_zero=True)
    before = [p.detach().clone() for p in trained]
    for broken in (True, False):
        for p in trained:
            p.grad = torch.ones_like(p)
        if broken:
            trained[0].grad[0, 0] = float("inf")
        scale.on_pre_optimizer_step(None, state, None)
        optimizer.step()
        moved = [not torch.equal(p, b) for p, b in zip(trained, before, strict=True)]
        assert not any(moved) if broken else all(moved)
    assert (scale.scale, scale.good_steps) == (512.0, 1)
    (tmp_path / "checkpoint-3").mkdir()
    scale.on_save(TrainingArguments(str(tmp_path)), state, None)
    resumed = LossScale(adapted, float16=True)
    resumed.restore(tmp_path / "checkpoint-3")
    assert (resumed.scale, resumed.good_steps) == (512.0, 1)
    # A head in another precision does not decide: parameters get the gradients that a float32 model gives.
    assert LossScale(adapted, float16=False).scale == 1.0
