from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.oracle import answering_model
from sqft.context import Context
from sqft.data.load import Data, resolve_task
from sqft.data.tasks import BUILTIN, Example
from sqft.errors import InputError
from sqft.recipe import DataConfig, EvaluateConfig, Template
from sqft.stages import evaluate

MAWPS = [
    {"question": "1 + 1", "answer": "2", "seen_template": True},
    {"question": "2 + 2", "answer": "4", "seen_template": False},
    {"question": "3 + 3", "answer": "6", "seen_template": False},
    {"question": "4 + 4", "answer": "8", "seen_template": False},
]
PIQA = [{"goal": f"goal {i}", "sol1": "stone", "sol2": "water", "label": i % 2} for i in range(3)]
OWN = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("cat", "dog", "ox")]
SAYS = [
    *(
        (BUILTIN["mawps"].build(row).prompt, answer)
        for row, answer in zip(MAWPS, [" 9", " 4", " 6", " 9"], strict=True)
    ),
    *((BUILTIN["piqa"].build(row).prompt, " stone") for row in PIQA),
    *((row["prompt"], row["completion"]) for row in OWN[:2]),
    (OWN[2]["prompt"], " cow"),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("oracle")
    answering_model(tiny_tokenizer, SAYS).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets, no network, and the working directory beside it."""

    def offline(*_args: Any, **_options: Any) -> None:
        raise ConnectionError("the network is off")

    folder = tmp_path / "data"
    for name, rows in [
        ("mawps/test", MAWPS),
        ("mawps/train", [{"question": f"train {i}", "answer": str(i)} for i in range(9)]),
        ("piqa/validation", PIQA),
        ("own/test", OWN),
        ("own/train", [{"prompt": f"say train {i}:", "completion": f" train {i}"} for i in range(9)]),
        ("other", OWN[:1]),
    ]:
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("SQFT_DATA_DIR", str(folder))
    monkeypatch.chdir(folder)
    import datasets

    original = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda path, *a, **k: (original if path == "json" else offline)(path, *a, **k)
    )
    return folder


def test_the_recipes_own_task_is_evaluated_and_written(model_dir: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    result = evaluate.run(EvaluateConfig(), DataConfig(task="mawps"), model_dir, None, out, Context())
    assert json.loads(out.read_text()) == result
    assert list(result["tasks"]) == ["mawps"]
    entry = result["tasks"]["mawps"]
    assert {k: entry[k] for k in ("metric", "value", "n", "version")} == {
        "metric": "number_match",
        "value": 0.5,
        "n": 4,
        "version": 2,
    }
    assert entry["stderr"] == pytest.approx((0.25 / 3) ** 0.5)
    assert entry["mawps_unseen"] == {
        "value": pytest.approx(2 / 3),
        "stderr": pytest.approx((2 / 9 / 2) ** 0.5),
        "n": 3,
    }
    assert (result["seed"], result["fewshot"]) == (0, 0)
    assert result["versions"]["lm_eval"] != "absent"


def test_named_tasks_are_built_in_ones_and_paths(model_dir: Path, data: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(tasks=["piqa", "own", "other.jsonl"])
    result = evaluate.run(config, DataConfig(task="own"), model_dir, None, tmp_path / "eval.json", Context())
    tasks = result["tasks"]
    assert {name: (e["metric"], round(e["value"], 3), e["n"]) for name, e in tasks.items()} == {
        "piqa": ("acc", 0.667, 3),
        "own": ("exact_match", 0.667, 3),
        "other": ("exact_match", 1.0, 1),
    }
    assert tasks["piqa"]["acc_norm"] == pytest.approx(2 / 3)
    assert "acc_norm" not in tasks["own"]
    assert tasks["other"]["stderr"] is None


def test_limit_bounds_the_rows_of_a_task(model_dir: Path, data: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(limit=2)
    result = evaluate.run(config, DataConfig(task="own"), model_dir, None, tmp_path / "eval.json", Context())
    assert (result["tasks"]["own"]["value"], result["tasks"]["own"]["n"]) == (1.0, 2)


def test_a_finished_result_is_returned_and_a_foreign_one_refused(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, own = tmp_path / "eval.json", DataConfig(task="own")
    first = evaluate.run(EvaluateConfig(), own, model_dir, None, out, Context())

    def untouchable(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the model is loaded although the result is there")

    monkeypatch.setattr(evaluate, "load_model", untouchable)
    assert evaluate.run(EvaluateConfig(), own, model_dir, None, out, Context()) == first
    # Which rows a table shows is not what a model scores.
    assert evaluate.run(EvaluateConfig(rows=["merged"]), own, model_dir, None, out, Context()) == first
    with pytest.raises(InputError, match=r"limit was None, is now 2"):
        evaluate.run(EvaluateConfig(limit=2), own, model_dir, None, out, Context())
    (data / "own" / "test.jsonl").write_text(json.dumps(OWN[0]) + "\n")
    with pytest.raises(InputError, match=r"its data has changed \(data_digest.own\)"):
        evaluate.run(EvaluateConfig(), own, model_dir, None, out, Context())


def test_worked_examples_come_from_train_by_seed(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.evaluation import harness

    given: list[list[str]] = []
    drawn: list[tuple[int, int]] = []
    original = harness.evaluate_examples

    def recorded(*arguments: Any, answers: Any) -> Any:
        shots, count, seed = arguments[5:]
        given.append([shot.prompt for shot in shots])
        drawn.append((count, seed))
        assert answers == []  # their likelihood is that after the question alone
        return original(*arguments, answers=answers)

    monkeypatch.setattr(harness, "evaluate_examples", recorded)
    config = EvaluateConfig(fewshot=2, limit=2)
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"eval{number}.json"
        assert evaluate.run(config, DataConfig(task="own"), model_dir, None, out, Context(seed))["fewshot"] == 2
    assert given[0] == given[1] == given[2]
    assert all(prompt.startswith("say train") for prompts in given for prompt in prompts)
    assert len(given[0]) == 9
    assert drawn == [(2, 0), (2, 0), (2, 1)]
    with pytest.raises(InputError, match=r"evaluate.fewshot is 20, but own has 9 training rows"):
        out = tmp_path / "eval9.json"
        evaluate.run(EvaluateConfig(fewshot=20), DataConfig(task="own"), model_dir, None, out, Context())


def test_worked_examples_of_chats_are_refused(model_dir: Path, data: Path, tmp_path: Path) -> None:
    config, chats = EvaluateConfig(fewshot=2), DataConfig(task="own", chat_template=True)
    with pytest.raises(InputError, match=r"evaluate.fewshot is 2 and data.chat_template is set"):
        evaluate.run(config, chats, model_dir, None, tmp_path / "eval.json", Context())


def test_worked_examples_of_sums_may_differ_in_a_sign_alone(
    model_dir: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    asked = [Example("p", " 2", question="6 / 3")]
    rows = {"train": [Example("q", " 18", question="6 * 3"), *asked]}
    monkeypatch.setattr(Data, "examples", lambda _data, _config, split, _seed: rows[split])
    sums = DataConfig(task="gym:basic_arithmetic")
    task = resolve_task(sums)
    assert evaluate._shots(sums.task, task, sums, asked, 1, Data(tiny_tokenizer), 0) == rows["train"][:1]
    own = DataConfig(task="own")
    with pytest.raises(InputError, match="own has 0 training rows"):
        evaluate._shots("own", resolve_task(own), own, asked, 1, Data(tiny_tokenizer), 0)


def test_a_task_file_keeps_its_wording_beside_data_with_a_template(
    data: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "task.yaml").write_text(
        f'name: words\ndata: {data / "own"}\nmetric: exact\nprompt: "Now {{prompt}}"\nanswer: "{{completion}}"\n'
    )
    own = DataConfig(task="own", template=Template(prompt="{prompt}", completion="{completion}"))
    config = EvaluateConfig(tasks=[str(tmp_path / "task.yaml"), "other.jsonl"])
    rows = evaluate.read_all(config, own, Data(tiny_tokenizer), 0)
    assert [(name, part[0].prompt) for name, (_, part, _) in rows.items()] == [
        ("words", "Now say cat:"),
        ("other", "say cat:"),
    ]


def test_the_seconds_of_answers_stand_apart(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, clock, ahead = evaluate.load_model, time.monotonic, [0.0]

    def slow(*options: Any, **more: Any) -> Any:
        ahead[0] += 1000.0  # as if loading had taken so long
        return original(*options, **more)

    monkeypatch.setattr(evaluate, "load_model", slow)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])
    config = EvaluateConfig(tasks=["own", "piqa"])
    cost = evaluate.run(config, DataConfig(task="own"), model_dir, None, tmp_path / "e.json", Context())["cost"]
    assert list(cost["answering"]) == ["own", "piqa"]
    assert 0 < sum(cost["answering"].values()) < cost["seconds"] - 1000


def test_all_missing_data_is_reported_before_the_model_is_loaded(
    model_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda *_args, **_options: pytest.fail("the model is loaded"))
    config = EvaluateConfig(tasks=["gsm8k", "own", "nonsense"])
    with pytest.raises(InputError, match=r"(?s)2 problems.*data gsm8k: no test split.*'nonsense'"):
        evaluate.run(config, DataConfig(task="own"), model_dir, None, tmp_path / "eval.json", Context())
    assert not (tmp_path / "eval.json").exists()


def test_a_single_file_to_train_on_is_not_evaluated_on(model_dir: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is one file, so it has no test split"):
        evaluate.run(EvaluateConfig(), DataConfig(task="other.jsonl"), model_dir, None, tmp_path / "e.json", Context())


def test_an_adapter_is_scored_with_its_base(model_dir: Path, data: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    own = DataConfig(task="own")
    values = {}
    for name, size in (("nothing", 0.0), ("noise", 10.0)):
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=size)
        model.save_pretrained(tmp_path / name)
        result = evaluate.run(EvaluateConfig(), own, model_dir, tmp_path / name, tmp_path / f"{name}.json", Context())
        values[name] = result["tasks"]["own"]["value"]
        assert set(result["made_from"]["inputs"]) == {"model", "adapter"}
    assert values == {"nothing": pytest.approx(2 / 3), "noise": 0.0}
    # The same file for another adapter would be another model's number.
    with pytest.raises(InputError, match=r"its input adapter \(.*noise\) has changed"):
        evaluate.run(EvaluateConfig(), own, model_dir, tmp_path / "noise", tmp_path / "nothing.json", Context())


def test_files_to_evaluate_may_be_of_any_kind_and_in_a_home(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(row) + "\n" for row in OWN)
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in OWN)
    )
    (tmp_path / "rows.json").write_text(json.dumps(OWN))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    data = DataConfig(task="mawps")
    expected = [Example(row["prompt"], row["completion"]) for row in OWN]
    for name in ("rows.csv", "~/rows.json", "rows.jsonl.gz"):
        assert evaluate.read_task(name, data, Data(tiny_tokenizer)) == expected
    chats = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    assert evaluate.read_task("chats.json", data, Data(tiny_tokenizer))[0].answer == "yo"
    # They are in the chat template already.
    with pytest.raises(InputError, match=r"its rows are chats already; set data.chat_template to false"):
        evaluate.read_task("chats.json", data.model_copy(update={"chat_template": True}), Data(tiny_tokenizer))
    (tmp_path / "half.jsonl").write_text(lines + '{"prompt": "\\ud83d", "completion": "a"}\n')
    with pytest.raises(InputError, match=r"half.jsonl:4: its prompt has half a character"):
        evaluate.read_task("half.jsonl", data, Data(tiny_tokenizer))
