"""The whole flow through the command line on a tiny model: results, resume after kills, refusals, exit codes."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sqft import cli, pipeline
from sqft.context import Context
from sqft.data.load import Data
from sqft.data.tasks import Example, Task
from sqft.errors import InputError
from sqft.pipeline import _log_checks, _write_summary, run
from sqft.preparation import Inputs, _leaks, prepare
from sqft.recipe import Recipe, load_recipe
from sqft.storage.checkpoint import Checkpoint

RECIPE = {
    "name": "tiny",
    "seed": 0,
    "threads": 1,
    "sparsify": {"calibration": {"samples": 4, "length": 32, "batch": 2}},
    "finetune": {
        "ranks": [4, 2], "lora_alpha": 8, "max_steps": 4, "length": 128, "batch": 2, "save_every": 1,
        "learning_rate": 0.02, "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    },
    "verify": {"prompts": 2, "accuracy_rows": 4},
    "evaluate": {"batch": 4},
}  # fmt: skip


@pytest.fixture
def recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A recipe file for a tiny bf16 Llama and sums as JSONL data."""
    data = tmp_path / "data"
    data.mkdir()
    for split, numbers in (("train", range(12)), ("test", range(12, 16))):
        rows = [
            {"prompt": f"Question: {a} + {b}?\nAnswer:", "completion": f" {a + b}"} for a in numbers for b in (1, 2)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {**RECIPE, "model": str(tiny_model("llama", "bfloat16")), "data": {"task": str(data)}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_one_command_makes_everything_and_again_does_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(["run", str(recipe), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "report: " in printed.out
    assert str(out / "report.html") in printed.out.replace("\n", "")
    made = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    folders = {"sparse", "adapter", "sub_adapter", "merged", "evaluations"}
    assert made == folders | {"verify.json", "eval.json", "report.md", "report.html"}
    proof = json.loads((out / "verify.json").read_text())
    assert proof["passed"]
    assert {"name", "passed", "value", "bound", "detail"} == set(proof["checks"][0])
    result = json.loads((out / "eval.json").read_text())
    assert {"tasks", "seed", "versions"} <= set(result)
    (entry,) = result["tasks"].values()
    assert {"metric", "value", "stderr", "n", "version"} <= set(entry)
    assert list(result["rows"]) == ["dense", "sparse", "tuned", "merged"]
    assert result["rows"]["tuned"] == result["rows"]["merged"]
    assert "<html" in (out / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert cli.run(["run", str(recipe), "--out", str(out)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert not list(out.glob(".partial*"))


def prepared(recipe: Recipe) -> Inputs:
    return prepare(recipe, Context(recipe.seed), Path(recipe.model))


INT4 = ["--set", "quantize={group_size: 16}", "--set", "finetune.kind=quantized"]


def test_the_quantised_story_from_one_command(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.run(["run", str(recipe), "--out", str(out), *INT4]) == 0
    made = {path.name for path in out.iterdir() if path.is_dir()}
    assert made == {"quantized", "adapter", "sub_adapter", "merged", "evaluations"}
    proof = json.loads((out / "verify.json").read_text())
    assert proof["passed"]
    assert {"codes_equal", "grid_untouched", "zeros_kept"} <= {check["name"] for check in proof["checks"]}
    result = json.loads((out / "eval.json").read_text())
    assert list(result["rows"]) == ["dense", "quantized", "tuned", "merged"]
    assert result["rows"]["tuned"] == result["rows"]["merged"]
    text = (out / "report.md").read_text()
    assert "INT4" in text
    assert "Sparse INT4, untuned" in text
    assert "quantized/sqft/manifest.json" in (out / "report.html").read_text()
    capsys.readouterr()
    assert cli.run(["inspect", str(out / "merged"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sparsity"] >= 0.5
    assert facts["quantization"]["bits"] == 4
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert cli.run(["run", str(recipe), "--out", str(out), *INT4]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_two_passes_write_the_sparse_model_too_and_lora_stays_beside_int4(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["quantize={group_size: 16, joint: false}", "finetune.kind=dense", "merge=null", "evaluate=null"]
    result = run(load_recipe(recipe, settings), out)
    assert result.verified is None
    one, other = (load_file(out / name / "sqft" / "mask.safetensors") for name in ("sparse", "quantized"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((out / "sub_adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["finetune.kind=quantized"], "kind quantized needs a quantised base"),
        (["quantize={group_size: 24}", "finetune.kind=quantized"], "group_size 24 does not divide"),
        (["quantize={bits: 5}"], "quantize.bits"),
        (["finetune.kind=dense", "quantize={group_size: 16}"], "set merge: null"),
        (["finetune.kind=quantized", "quantize={group_size: 16, ignore: [up_proj]}"], "leaves 2 such linears float"),
        (
            ["sparsify.method=sparsegpt", "finetune={kind: quantized, start: float}", "quantize={group_size: 16}"],
            "joint pass with sparsegpt",
        ),
        (["quantize={}"], "finetune.kind sparse needs a float base"),
        (
            ["quantize={calibration: {samples: 2, length: 32}}", "finetune.kind=quantized"],
            "have different calibrations",
        ),
    ],
)
def test_a_wrong_quantised_recipe_is_refused_before_work(
    settings: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    assert cli.run(["run", str(recipe), "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "quantized").exists()


def test_another_recipe_in_the_same_folder_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(["run", str(recipe), "--out", str(out), "--set", "evaluate=null", "--set", "verify=null"]) == 0
    weights = (out / "merged" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert cli.run(["run", str(recipe), "--out", str(out), "--set", "sparsify.sparsity=0.6"]) == 2
    message = capsys.readouterr().err
    assert "belongs to another recipe" in message
    assert "sparsity was 0.5, is now 0.6" in message
    assert (out / "merged" / "model.safetensors").read_bytes() == weights


def test_everything_wrong_is_reported_before_any_work(recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["data"]["task"] = str(tmp_path / "broken")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    (tmp_path / "broken" / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    values["finetune"]["target_modules"] = ["nothing"]
    values["sparsify"]["pattern"] = "3:7"
    with pytest.raises(InputError) as error:
        run(Recipe.model_validate(values), tmp_path / "out")
    message = str(error.value)
    assert "train.jsonl:2" in message or "line 2" in message
    assert "recipe tiny: 3 problems" in message
    assert "target module 'nothing'" in message
    assert "pattern 3:7 does not divide" in message
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


TUNED_NOWHERE = ["finetune=null", "merge=null", "verify=null"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "1 of the 24 training rows ask what evaluate.tasks HELD reports"),
        (TUNED_NOWHERE, "1 of the 24 training rows"),  # calibration reads them
        ([*TUNED_NOWHERE, "sparsify.calibration.data=TEXT"], None),
        (["evaluate.limit=1"], None),  # the first row alone is reported
        (
            ["search.strategy=random", "data.validation_rows=12"],
            r"search selects on \d+ questions that evaluate.tasks OTHERS reports",
        ),
    ],
)
def test_reported_questions_are_not_tuned_or_calibrated_or_selected_on(
    settings: list[str], message: str | None, recipe: Path, tmp_path: Path
) -> None:
    held, others, text = tmp_path / "held.jsonl", tmp_path / "others.jsonl", tmp_path / "text.txt"
    row = '{{"prompt": "question: {} + {}  ANSWER", "completion": " 3"}}\n'.format
    held.write_text(row(70, 1) + row(1, 2))
    others.write_text("".join(row(a, b) for a in range(12) for b in (1, 2)))
    text.write_text("a text of its own " * 40)
    places = {"HELD": held, "OTHERS": others, "TEXT": text}

    def placed(line: str) -> str:
        for name, path in places.items():
            line = line.replace(name, str(path))
        return line

    reported = "OTHERS" if message and "OTHERS" in message else "HELD"
    made = load_recipe(recipe, [placed(line) for line in [*settings, f"evaluate.tasks=[{reported}]"]])
    if message is None:
        prepared(made)
        return
    with pytest.raises(InputError, match=placed(message)):
        prepared(made)


def test_sums_that_differ_in_a_sign_alone_are_other_questions(recipe: Path) -> None:
    sums = load_recipe(recipe, ["data.task=gym:basic_arithmetic"])
    train = [Example("p", " 2", question="Calculate 6 / 3."), Example("p", " 5", question="Calculate 6 - 1.")]
    task = Task("held", "exact")
    reported = {"held": (task, [Example("Calculate 6 * 3.", " 18"), Example("calculate  6 - 1.", " 5")], [])}
    assert [message[:26] for message in _leaks(sums, Data(), train, [], reported)] == ["1 of the 2 training rows a"]
    assert [message[:24] for message in _leaks(sums, Data(), [], [(task, train)], reported)] == [
        "search selects on 1 ques"
    ]
    assert [message[:26] for message in _leaks(load_recipe(recipe), Data(), train, [], reported)] == [
        "2 of the 2 training rows a"
    ]


def test_worked_examples_that_are_not_there_are_missed_before_any_work(recipe: Path) -> None:
    made = load_recipe(recipe, ["evaluate.fewshot=99"])
    with pytest.raises(InputError, match=r"evaluate.fewshot is 99, but .* has 24 training rows"):
        prepared(made)


def test_one_file_is_enough_where_nothing_is_judged(recipe: Path) -> None:
    file = Path(yaml.safe_load(recipe.read_text())["data"]["task"]) / "train.jsonl"
    made = load_recipe(recipe, [f"data.task={file}", "finetune=null", "evaluate=null"])
    assert made.merge is not None and made.verify is not None  # the defaults, with nothing to do
    assert prepared(made).test == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("finetune.rank=[4]", "unknown key 'finetune.rank'; did you mean 'ranks'?"),
        ("sparsify.sparsity=1.0", "sparsity is 1.0; choose a number strictly between 0 and 1"),
        ("finetune.lora_alpha=0", "lora_alpha"),
        ("finetune.ranks=[0]", "finetune.ranks"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("finetune.seed=4294967296", "finetune.seed: Input should be less than or equal to 4294967295"),
        ("model=./no/such/folder", "no such folder"),
        ("data.task=gsmk8", "did you mean 'gsm8k'?"),
    ],
)
def test_a_wrong_setting_is_exit_code_2_with_one_message(
    setting: str, message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["run", str(recipe), "--out", str(tmp_path / "out"), "--set", setting]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_the_dense_baseline_needs_no_sparsity(recipe: Path, tmp_path: Path) -> None:
    settings = ["sparsify=null", "finetune.kind=dense", "finetune.ranks=[4]"]
    values = load_recipe(recipe, settings)
    result = run(values, tmp_path / "out")
    assert result.verified
    assert not (tmp_path / "out" / "sparse").exists()


def test_shears_is_a_dense_elastic_adapter_on_a_sparse_base_left_unmerged(recipe: Path, tmp_path: Path) -> None:
    result = run(load_recipe(recipe, ["finetune.kind=dense", "merge=null"]), tmp_path / "out")
    assert result.verified is None
    rows = json.loads((tmp_path / "out" / "eval.json").read_text())["rows"]
    assert list(rows) == ["dense", "sparse", "tuned"]


def test_the_stages_as_single_commands(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what has no --out goes under runs/
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    model, task = values["model"], values["data"]["task"]
    at = {name: str(tmp_path / name) for name in ("sparse", "adapter", "sub", "merged")}

    def sqft(*arguments: str) -> str:
        assert cli.run(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    calibration = ["--calibration.samples", "4", "--calibration.length", "32"]
    assert "sparsified 14/14 linears" in sqft("sparsify", model, at["sparse"], "--task", task, *calibration)
    training = ["--ranks", "4", "2", "--max-steps", "2", "--length", "128", "--batch", "2"]
    assert "2 steps" in sqft("finetune", at["sparse"], at["adapter"], "--task", task, *training)
    assert "heuristic ranks" in sqft("extract", at["adapter"], at["sub"])
    assert "0 pruned ones filled" in sqft("merge", at["sparse"], at["sub"], at["merged"])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "50 % of the weights of the adapted linears are zero" in card
    assert "AutoModelForCausalLM.from_pretrained(folder" in card
    proof = ["verify", at["merged"], "--base", at["sparse"], "--adapter", at["sub"]]
    assert "verified: " in sqft(*proof, "--task", task, "--prompts", "2", "--accuracy-rows", "2")
    assert json.loads(sqft(*proof, "--out", str(tmp_path / "random.json"), "--json"))["passed"]
    facts = json.loads(sqft("inspect", at["merged"], "--json"))
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert facts["precision"] == {"bfloat16": 1.0}
    assert "sparsity of the blocks' linears 0.5" in sqft("inspect", at["merged"])
    out = ["--out", str(tmp_path / "eval.json"), "--json"]
    assert json.loads(sqft("evaluate", at["merged"], "--task", task, *out))["tasks"]
    for limit in ("1", "2", "1"):  # other arguments, another file; the same ones find what is there
        assert "written: " in sqft("evaluate", at["merged"], "--task", task, "--limit", limit)
    assert len(list((tmp_path / "runs" / "evaluate").glob(f"{tmp_path.name}-merged-*.json"))) == 2
    # A damaged merge: exit code 1 and the weight that fails.
    checkpoint = Checkpoint(at["merged"])
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint.write(name, checkpoint.read(name) + 1)
    shutil.rmtree(Path(at["merged"]) / "sqft", ignore_errors=True)
    assert cli.run([*proof, "--out", str(tmp_path / "damaged.json")]) == 1
    assert f"new non-zeros in {name}" in capsys.readouterr().out


def test_a_search_by_command_does_not_select_on_what_was_trained_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    model, task = values["model"], values["data"]["task"]
    training = ["--kind", "dense", "--ranks", "4", "2", "--max-steps", "1", "--length", "128", "--batch", "2"]
    searching = ["--base", model, "--task", task, "--validation-rows", "6", "--turns", "1", "--neighbours", "1"]
    assert cli.run(["finetune", model, "whole", "--task", task, *training]) == 0
    assert cli.run(["search", "whole", "best", *searching]) == 2
    assert "was trained on 6 of the 6 rows that the search would select on" in capsys.readouterr().err
    assert cli.run(["finetune", model, "part", "--task", task, "--validation-rows", "6", *training]) == 0
    assert cli.run(["search", "part", "best", *searching]) == 0, capsys.readouterr().err
    assert "configurations" in capsys.readouterr().out


def test_the_commands_over_recipes(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sqft(*arguments: str, code: int = 0) -> str:
        assert cli.run(list(arguments)) == code, capsys.readouterr().err
        return capsys.readouterr().out

    out = ["--out", str(tmp_path / "compared")]
    table = sqft("compare", str(recipe), *out, "--methods", "dense", "sparsepeft")
    assert "SQFT + SparsePEFT" in table and "yes, verified" in table
    swept = sqft("sweep", str(recipe), "--out", str(tmp_path / "swept"), "--levels", "0.5", "--methods", "dense")
    assert "table and chart: " in swept


def test_a_plan_says_what_will_not_fit(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft import plan

    def forecast(*_: Any) -> list[plan.Forecast]:
        return [
            plan.Forecast("sparsify", 10, 10, 0, 1.0, True),
            plan.Forecast("finetune", 10, 10**15, 3 * 10**9, 1.0, False),
        ]

    monkeypatch.setattr(plan, "plan", forecast)
    assert cli.run(["plan", str(recipe), "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "will not fit: finetune" in told and "on the card" in told and "3.00 GB" in told
    assert cli.run(["plan", str(recipe), "--out", str(tmp_path), "--json"]) == 1
    assert [stage["fits"] for stage in json.loads(capsys.readouterr().out)["stages"]] == [True, False]


def test_the_quantised_stages_as_single_commands(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    model, task = values["model"], values["data"]["task"]
    at = {name: str(tmp_path / name) for name in ("sparse", "int4", "two", "adapter", "merged")}

    def sqft(*arguments: str) -> str:
        assert cli.run(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    calibration = ["--task", task, "--calibration.samples", "4", "--calibration.length", "32"]
    joint = sqft("quantize", model, at["int4"], "--sparsity", "0.5", "--group-size", "16", *calibration)
    assert "quantised 14/14 linears to 4 bits, 99.3 % of the blocks' weights; sparsity 0.5" in joint
    sqft("sparsify", model, at["sparse"], *calibration, "--validation-rows", "6")
    manifest = json.loads((tmp_path / "sparse" / "sqft" / "manifest.json").read_text())
    assert manifest["config"]["calibrated_on"]["data"]["validation_rows"] == 6
    two = sqft("quantize", at["sparse"], at["two"], "--bits", "3", "--group-size", "null", "--method", "rtn")
    assert "to 3 bits, 99.3 % of the blocks' weights; sparsity 0.5" in two
    assert cli.run(["quantize", model, str(tmp_path / "none"), "--group-size", "16"]) == 2
    assert "--task NAME or --calibration.data FILE is needed" in capsys.readouterr().err
    training = ["--kind", "quantized", "--ranks", "4", "--max-steps", "2", "--length", "128", "--batch", "2"]
    sqft("finetune", at["int4"], at["adapter"], "--task", task, *training)
    assert "0 pruned ones filled" in sqft("merge", at["int4"], at["adapter"], at["merged"])
    assert "verified: " in sqft("verify", at["merged"], "--base", at["int4"], "--adapter", at["adapter"])
    assert "int4" in sqft("inspect", at["merged"])
    # Another base, and what of it differs.
    assert cli.run(["merge", at["two"], at["adapter"], str(tmp_path / "wrong")]) == 2
    message = capsys.readouterr().err
    assert "was trained on another base" in message
    assert "what differs: codes, mask, scales and zero points, start" in message


@pytest.mark.parametrize(
    "command",
    [
        *("run", "plan", "compare", "sweep", "sparsify", "quantize", "finetune", "extract", "search", "merge"),
        *("verify", "inspect", "evaluate"),
    ],
)
def test_help_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run([command, "--help"])
    assert stop.value.code == 0
    assert f"Example: sqft {command}" in capsys.readouterr().out


def test_magnitude_needs_text_only_to_update(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sparsify", str(tiny_model("llama")), str(tmp_path / "o"), "--method", "magnitude"]
    assert cli.run([*command, "--update"]) == 2
    assert "this method looks at text" in capsys.readouterr().err
    assert cli.run([*command, "--no-update"]) == 0


def test_sparsify_without_text_says_what_to_give(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["sparsify", str(tiny_model("llama")), str(tmp_path / "o")]) == 2
    assert "--task NAME or --calibration.data FILE" in capsys.readouterr().err


def test_one_file_of_rows_is_enough(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((Path(values["data"]["task"]) / f"{s}.jsonl").read_text() for s in ("train", "test")))
    one_file = ["--set", f"data.task={file}", "--set", "finetune.max_steps=1"]
    assert cli.run(["run", str(recipe), "--out", "refused", *one_file]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "is one file, so it has no test split" in message and "or set data.test_rows to cut one" in message
    cut = [*one_file, "--set", "data.test_rows=6", "--set", "data.validation_rows=5"]
    assert cli.run(["run", str(recipe), "--out", "out", *cut]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert results["tasks"]["rows"]["n"] == 6
    manifest = json.loads((tmp_path / "out" / "adapter" / "sqft" / "manifest.json").read_text())
    assert manifest["config"]["data"]["data"]["test_rows"] == 6
    found = prepared(load_recipe(recipe, [*cut[1::2]]))
    assert len(found.test) == 6 and len(found.train) == 32 - 6 - 5
    assert not {e.prompt for e in found.test} & {e.prompt for e in found.train}
    # Single commands take the same flag, and judge the same rows.
    capsys.readouterr()
    judged = ["evaluate", "out/merged", "--task", str(file), "--test-rows", "6", "--validation-rows", "5", "--json"]
    assert cli.run(judged) == 0, capsys.readouterr().err
    alone, in_run = json.loads(capsys.readouterr().out)["tasks"]["rows"], results["tasks"]["rows"]
    # In batches of another size, and bfloat16 products of few rows may be rounded otherwise than those of many.
    nlls = [entry.pop("rows_nll")["value"] for entry in (alone, in_run)]
    assert nlls[0] == pytest.approx(nlls[1], rel=1e-3)
    assert alone == in_run


def test_test_rows_are_refused_where_there_are_some(recipe: Path, tmp_path: Path) -> None:
    made = load_recipe(recipe, ["data.test_rows=3"])
    with pytest.raises(InputError, match=r"data.test_rows is 3, but there is a test split already \(.*test.jsonl\)"):
        prepared(made)


def test_the_stable_result_is_that_of_the_furthest_model(tmp_path: Path) -> None:
    results = {row: {"tasks": {"t": row}, "versions": {}} for row in ("merged", "dense")}
    _write_summary(tmp_path, results, 0)
    assert json.loads((tmp_path / "eval.json").read_text())["model"] == "merged"


def test_the_checks_are_logged_and_what_fails_with_its_numbers(caplog: pytest.LogCaptureFixture) -> None:
    good = {"name": "codes_equal", "passed": True, "value": 0, "bound": 0, "detail": "150 adapted linears"}
    with caplog.at_level("INFO", "sqft"):
        _log_checks([good, {**good, "name": "zeros_kept"}])
    assert [record.getMessage() for record in caplog.records] == ["all 2 checks hold: codes_equal, zeros_kept"]
    caplog.clear()
    with caplog.at_level("INFO", "sqft"):
        _log_checks([good, {**good, "name": "zeros_kept", "passed": False, "value": 3, "detail": "new non-zeros in x"}])
    (said,) = caplog.records
    assert (said.levelname, said.getMessage()) == ("ERROR", "zeros_kept: 3, bound 0; new non-zeros in x")


def test_the_same_command_on_another_day_asks_the_same(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    shutil.copytree(values["model"], model)
    template = model / "chat_template.jinja"
    template.write_text("Today is {{ strftime_now('%d %b %Y') }}. " + template.read_text())
    short = ["finetune.max_steps=1", "evaluate=null", "data.chat_template=true", f"model={model}"]
    made = load_recipe(recipe, short)

    def on(day: int) -> type[datetime.datetime]:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
                return datetime.datetime(2026, 1, day, 12)

        return Clock

    monkeypatch.setattr(pipeline, "datetime", on(30))
    run(made, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "adapter" / "sqft" / "manifest.json").read_text())
    assert manifest["config"]["data"]["data"]["date"] == "2026-01-30T12:00:00"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    monkeypatch.setattr(pipeline, "datetime", on(31))
    run(made, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    # A new run has its own day.
    assert pipeline.fix_date(made, Context(), model, tmp_path / "other").data.date == "2026-01-31T12:00:00"
