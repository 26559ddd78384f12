"""The stages as Python functions: they make what the commands and a whole run make, and refuse what these refuse."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import sqft
from sqft import cli
from sqft.artifact import Artifact

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "python.md"
CALIBRATION = {"samples": 4, "length": 32}
TRAINING: dict[str, Any] = {"ranks": [4, 2], "lora_alpha": 8, "max_steps": 2, "length": 128, "batch": 2}


@pytest.fixture
def place(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a tiny model and data."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(tiny_model("llama", "bfloat16"))
    Path("my_data").mkdir()
    for split, numbers in (("train", range(12)), ("test", range(12, 16))):
        rows = [
            {"prompt": f"Question: {a} + {b}?\nAnswer:", "completion": f" {a + b}"} for a in numbers for b in (1, 2)
        ]
        Path("my_data", f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def digests(folder: Path) -> dict[str, str]:
    """Digests of a stage's files, but for those of an adapter that name the path of its base."""
    files: dict[str, str] = json.loads((folder / "sqft" / "manifest.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name not in ("adapter_config.json", "README.md")}


def test_verbs_commands_and_a_run_make_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sqft.sparsify("model", "v/sparse", data="my_data", calibration=CALIBRATION)
    sqft.finetune("v/sparse", "v/adapter", data={"task": "my_data"}, **TRAINING)
    sqft.extract("v/adapter", "v/sub_adapter")
    sqft.merge("v/sparse", "v/sub_adapter", "v/merged")
    folders = {"base": "v/sparse", "adapter": "v/sub_adapter"}
    proof = sqft.verify("v/merged", **folders, data="my_data", prompts=2, accuracy_rows=2)
    score = sqft.evaluate("v/merged", data="my_data")

    def command(*arguments: str) -> None:
        assert cli.run(list(arguments)) == 0, capsys.readouterr().err

    data = ["--task", "my_data"]
    command("sparsify", "model", "c/sparse", *data, "--calibration.samples", "4", "--calibration.length", "32")
    flags = ["--ranks", "4", "2", "--lora-alpha", "8", "--max-steps", "2", "--length", "128", "--batch", "2"]
    command("finetune", "c/sparse", "c/adapter", *data, *flags)
    command("extract", "c/adapter", "c/sub_adapter")
    command("merge", "c/sparse", "c/sub_adapter", "c/merged")

    recipe = {"name": "r", "model": "model", "data": {"task": "my_data"}, "finetune": TRAINING}
    recipe |= {"sparsify": {"calibration": CALIBRATION}, "verify": None}
    sqft.run(sqft.Recipe.model_validate(recipe), Path("r"))
    for name in ("sparse", "adapter", "sub_adapter", "merged"):
        assert digests(Path("v", name)) == digests(Path("c", name)) == digests(Path("r", name)), name
    assert proof["passed"]
    assert json.loads(proof.path.read_text()) == proof
    assert json.loads(Path("r/evaluations/merged.json").read_text())["tasks"] == score["tasks"]
    # A command finds what a function made, and the other way round.
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*.json")}
    command("sparsify", "model", "v/sparse", *data, "--calibration.samples", "4", "--calibration.length", "32")
    command("evaluate", "v/merged", *data)
    sqft.finetune("c/sparse", "c/adapter", data="my_data", **TRAINING)
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*.json")}


def test_quantize_prunes_in_the_same_pass(place: Path) -> None:
    settings: dict[str, Any] = {"data": "my_data", "group_size": 16, "calibration": CALIBRATION}
    made = sqft.quantize("model", "int4", sparsity=0.5, **settings)
    assert made.manifest["result"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert made.manifest["config"]["sparsify"].get("update") is None
    pruning = ["--group-size", "16", "--sparsity", "0.5", "--update"]
    text = ["--task", "my_data", "--calibration.samples", "4", "--calibration.length", "32"]
    assert cli.run(["quantize", "model", "updated", *pruning, *text]) == 0
    assert Artifact.open("updated").manifest["config"]["sparsify"]["update"] is True
    assert digests(Path("updated")) != digests(Path("int4"))
    assert sqft.quantize("model", "dense", method="rtn", group_size=16).manifest["result"]["sparsity"] < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sqft.sparsify("model", "o", sparsty=0.5), "sparsify: unknown key 'sparsty'; did you mean 'sparsity'"),
        (lambda: sqft.finetune("model", "o", data="my_data", rank=[4]), "unknown key 'rank'; did you mean 'ranks'"),
        (
            lambda: sqft.sparsify("model", "o", task="my_data"),
            "task is a setting of the data; write data={'task': ...}",
        ),
        (lambda: sqft.evaluate("model", data={"tsk": "x"}), "unknown key 'tsk'; did you mean 'task'"),
        (lambda: sqft.sparsify("model", "o"), "in Python data=NAME"),
        (lambda: sqft.sparsify("model", "o", sparsity=1.5), "choose a number strictly between 0 and 1"),
        (
            lambda: sqft.extract("adapter", "o", strategy="random"),
            "strategy random evaluates configurations; use search",
        ),
        (lambda: sqft.merge("model", "adapter", "o", allow_loss=True), "did you mean 'allow_"),
        (lambda: sqft.quantize("model", "o", data="my_data", update=True), "update makes up for what sparsity prunes"),
    ],
)
def test_what_a_verb_does_not_take_is_refused_before_any_work(
    place: Path, call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(sqft.InputError, match=re.escape(message)):
        call()
    assert not Path("o").exists()


@pytest.mark.slow
def test_every_block_of_the_page_runs(place: Path) -> None:
    values = {"name": "mine", "model": "model", "data": {"task": "my_data"}, "sparsify": {"calibration": CALIBRATION}}
    Path("mine.yaml").write_text(yaml.safe_dump({**values, "finetune": TRAINING}))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        # A machine without a GPU, a moment instead of three epochs, and a model with rows of 32.
        block = block.replace('SFTConfig("out")', 'SFTConfig("out", use_cpu=True, bf16=False, max_steps=1)')
        exec(block.replace('"int4", sparsity', '"int4", group_size=16, sparsity'), {})
    assert Path("runs/mine/report.html").is_file()
    assert json.loads(next(Path("runs/verify").glob("*.json")).read_text())["passed"]
