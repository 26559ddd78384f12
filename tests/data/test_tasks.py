from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.data.numbers import final_number, same_number
from sqft.data.tasks import BUILTIN, Example, normalise

INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "{}\n"
    "\n"
    "### Response:"
)
HUB_HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": [
        "is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.",
        "is holding a rubik's cube.",
        "starts pulling up roofing on a roof.",
    ],
    "label": "3",
}

ROWS: list[tuple[str, dict[str, Any], Example]] = [
    (
        "gsm8k",
        {"question": "Tom has 2 pens and buys 3. How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        Example("Question: Tom has 2 pens and buys 3. How many?\nAnswer:", " 2 + 3 = <<2+3=5>>5\n#### 5"),
    ),
    (
        "mawps",
        {"question": "3 hours for 6 days ?", "equation": "x=3*6", "answer": "18.0"},
        Example(INSTRUCTION.format("3 hours for 6 days ?"), " 3*6 = 18"),
    ),
    (
        "mawps",
        {"question": "How long ?", "answer": "1.8333333333333335", "seen_template": False},
        Example(INSTRUCTION.format("How long ?"), " 1.8333", tags=("unseen",)),
    ),
    (
        "mawps",
        {"question": "What ?", "answer": "-15", "seen_template": True},
        Example(INSTRUCTION.format("What ?"), " -15"),
    ),
    (
        "mawps",
        {"question": "On the Hub ?", "result": "1_200", "result_float": 1200.0},
        Example(INSTRUCTION.format("On the Hub ?"), " 1200"),
    ),
    (
        "svamp",
        {"Body": "A disc costs 76 dollars", "Question": "How much are two?", "Answer": "152.0"},
        Example(INSTRUCTION.format("A disc costs 76 dollars. How much are two?"), " 152"),
    ),
    (
        "svamp",
        {"Body": "An atom", "Question": "How long?", "Answer": 1e-05},
        Example(INSTRUCTION.format("An atom. How long?"), " 1e-05"),
    ),
    (
        "svamp",
        {"Body": "Paco ate 9 cookies. ", "Question": "How many?", "Answer": 9},
        Example(INSTRUCTION.format("Paco ate 9 cookies. How many?"), " 9"),
    ),
    (
        "boolq",
        {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
        Example("Ice is frozen water.\nQuestion: is ice cold?\nAnswer:", " yes", (" no", " yes"), 1),
    ),
    (
        "piqa",
        {"goal": "Dry a cup", "sol1": "Use a towel", "sol2": "Use soup", "label": 0},
        Example("Question: Dry a cup\nAnswer:", " Use a towel", (" Use a towel", " Use soup"), 0),
    ),
    ("hellaswag", HUB_HELLASWAG, Example("Roof shingle removal: A man is sitting on a roof. He", "", (), 3)),
    (
        "hellaswag",
        {
            "activity_label": "Youth",
            "ctx_a": "[header] How to nap [title] Find a bed. [step] A soft one.",
            "ctx_b": "",
            "endings": ["[substeps] Lie  down.", "Run."],
            "label": 0,
        },
        # A mark at the beginning leaves its space, here as in lm-eval.
        Example("Youth: How to nap. Find a bed. A soft one.", "  Lie down.", ("  Lie down.", " Run."), 0),
    ),
    (
        "winogrande",
        {"sentence": "Ann met Bea because _ was late.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        Example(
            "Ann met Bea because Bea",
            " was late.",
            gold=1,
            contexts=("Ann met Bea because Ann", "Ann met Bea because Bea"),
        ),
    ),
    (
        "arc_easy",
        {"question": "What is ice?", "choices": {"text": ["fire", "water"], "label": ["A", "B"]}, "answerKey": "B"},
        Example("Question: What is ice?\nAnswer:", " water", (" fire", " water"), 1),
    ),
    (
        "arc_challenge",
        {"question": "1 or 2?", "choices": {"text": ["one", "two"], "label": ["1", "2"]}, "answerKey": "1"},
        Example("Question: 1 or 2?\nAnswer:", " one", (" one", " two"), 0),
    ),
    (
        "openbookqa",
        {"question_stem": "The sun is", "choices": {"text": ["hot", "wet"], "label": ["A", "B"]}, "answerKey": " A"},
        Example("The sun is", " hot", (" hot", " wet"), 0),
    ),
]


@pytest.mark.parametrize(("task", "row", "expected"), ROWS, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(ROWS)])
def test_rows_read_as_the_reference_and_lm_eval_word_them(task: str, row: dict[str, Any], expected: Example) -> None:
    example = BUILTIN[task].build(row)
    assert example.prompt == expected.prompt
    assert example.gold == expected.gold
    if expected.answer:
        assert (example.answer, example.choices) == (expected.answer, expected.choices)
    assert example.contexts == expected.contexts
    assert example.tags == expected.tags
    if example.choices:
        assert example.answer == example.choices[example.gold]


def test_hub_and_joined_hellaswag_give_one_prompt() -> None:
    build = BUILTIN["hellaswag"].build
    joined = {k: HUB_HELLASWAG[k] for k in ("endings", "label")}
    joined["ctx"] = "Roof shingle removal: A man is sitting on a roof. he"
    assert build(joined) == build(HUB_HELLASWAG)
    for context, prompt in [
        ("Jump: The boy lies down. the boy", "Jump: The boy lies down. The boy"),
        ('Film: "we mow lawns!" appears on screen. a man', 'Film: "we mow lawns!" appears on screen. A man'),
        ("Youth: How to nap. Find a bed. A soft one.", "Youth: How to nap. Find a bed. A soft one."),
        ("Dance: They spin. Bob", "Dance: They spin. Bob"),
        ('Ride: It is hot. " a camel ride', 'Ride: It is hot. " a camel ride'),
    ]:
        assert build({"ctx": context, "endings": ["x", "y"], "label": "0"}).prompt == prompt


def test_the_local_hellaswag_row_reads_as_the_hub_row(data_dir: Path) -> None:
    with (data_dir / "hellaswag" / "validation.jsonl").open() as stream:
        local = json.loads(next(stream))
    assert BUILTIN["hellaswag"].build(local) == BUILTIN["hellaswag"].build(HUB_HELLASWAG)


def test_hellaswag_of_lm_eval_gives_the_same_prompt() -> None:
    from datasets import Dataset
    from lm_eval.tasks.hellaswag.utils import process_docs

    theirs = process_docs(Dataset.from_list([HUB_HELLASWAG]))[0]
    ours = BUILTIN["hellaswag"].build(HUB_HELLASWAG)
    assert (theirs["query"], [f" {c}" for c in theirs["choices"]]) == (ours.prompt, list(ours.choices))


@pytest.mark.parametrize("name", ["arc_easy", "openbookqa", "boolq", "piqa", "winogrande", "gsm8k"])
def test_prompts_equal_those_of_lm_evals_own_task(name: str) -> None:
    """lm-eval's own YAML, rendered on our hand-written row, is the independent oracle."""
    import yaml
    from lm_eval import tasks, utils

    folder = Path(tasks.__file__).parent
    file = {"boolq": "super_glue/boolq/default.yaml", "arc_easy": "arc/arc_easy.yaml"}.get(name, f"{name}/{name}.yaml")
    row = next(dict(row) for task, row, _ in ROWS if task == name)
    example = BUILTIN[name].build(row)
    if name == "winogrande":
        from lm_eval.tasks.winogrande import preprocess_winogrande as theirs

        assert tuple(theirs.doc_to_choice(row)) == example.contexts
        assert f" {theirs.doc_to_target(row)}" == example.answer
        assert theirs.doc_to_text(row) == example.gold
        return
    config = yaml.safe_load((folder / file).read_text().replace("!function", ""))
    text = config["doc_to_text"]
    prompt = row[text] if text in row else utils.apply_template(text, row)
    assert prompt == example.prompt
    if name == "gsm8k":
        assert utils.apply_template(config["doc_to_target"], row) == example.answer.removeprefix(" ")
        return
    if name == "boolq":
        choices = config["doc_to_choice"]
    else:
        import ast

        choices = ast.literal_eval(utils.apply_template(config["doc_to_choice"], row))
    assert [f" {choice}" for choice in choices] == list(example.choices)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("hellaswag", {"ctx": "A. he", "endings": ["x"], "label": ""}, "invalid literal"),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": -1}, "label -1 names none of its 2 choices"),
        (
            "arc_easy",
            {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"},
            "answerKey 'E' is none of its labels",
        ),
        ("winogrande", {"sentence": "none", "option1": "a", "option2": "b", "answer": "1"}, "no blank '_'"),
        ("winogrande", {"sentence": "a _", "option1": "a", "option2": "b", "answer": ""}, "neither '1' nor '2'"),
        ("mawps", {"question": "q", "answer": "seven"}, "could not convert"),
    ],
)
def test_rows_without_a_usable_label_are_refused(task: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BUILTIN[task].build(row)


@pytest.mark.parametrize(
    ("text", "marker", "number"),
    [
        ("It is 7.", "", 7),
        ("first 3, then 1,234", "", 1234),
        ("-5 degrees", "", -5),
        ("9-5", "", 5),
        ("cost $ .5", "", 0.5),
        ("10.25 m", "", 10.25),
        ("no number", "", None),
        ("", "", None),
        ("2 + 2 = 4\n#### 4", "####", 4),
        ("4 is the answer", "####", None),
        ("#### four", "####", None),
        ("#### 1\nwait\n#### 2", "####", 1),
        ("8\n#### -1,000", "####", -1000),
        ("#### 4 of 5 pens", "####", 4),
        ("#### 12.", "####", 12),
        ("#### $5", "####", None),
        ("####5", "####", None),
        ("#### none\n#### 3", "####", 3),
        ("It is: 5, or 6", "is: ", 5),
        # Exponents.
        ("1e-05", "", 1e-05),
        ("about 2.5E+7 of them", "", 2.5e7),
        ("1e+22", "", 1e22),
        ("1,234.5e3", "", 1234500),
        ("-1.5e-3.", "", -0.0015),
        (".5e3", "", 500),
        ("9-5e3", "", 5000),
        ("3e8m/s", "", 3e8),
        ("答案是1e5", "", 1e5),
        ("#### 1e-05", "####", 1e-05),
        ("#### 1,234.5e3.", "####", 1234500),
        ("#### 1e5 of 2", "####", 1e5),
        # None of them: no digits, a name, no whole number.
        ("3e", "", 3),
        ("3e-", "", 3),
        ("3 e5", "", 5),
        ("x2e5", "", 5),
        ("0x1e5", "", 5),
        ("1e5.5", "", 5.5),
        ("2e5, then 7", "", 7),
        # The minus sign of typography.
        ("\u22125", "", -5),
        ("it is \u22121.5e\u22123", "", -0.0015),
        ("9\u22125", "", 5),
        ("\uff0d5 \u5ea6", "", -5),
        ("#### \u22121,000", "####", -1000),
    ],
)
def test_the_final_number_of_a_text(text: str, marker: str, number: float | None) -> None:
    assert final_number(text, marker) == number


@pytest.mark.parametrize(
    "text", ["#### 1\nwait\n#### 2", "#### 4 of 5", "8\n#### -1,000", "#### $5", "####5", "5 ####"]
)
def test_the_marked_number_is_that_of_lm_evals_strict_match(text: str) -> None:
    import yaml
    from lm_eval import tasks
    from lm_eval.filters.extraction import RegexFilter

    file = Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    strict = next(f for f in yaml.safe_load(file.read_text())["filter_list"] if f["name"] == "strict-match")
    ((found,),) = RegexFilter(strict["filter"][0]["regex_pattern"]).apply([[text]], [{}])
    expected = None if found == "[invalid]" else float(found.replace(",", ""))
    assert final_number(text, "####") == expected


def test_numbers_agree_within_a_thousandth() -> None:
    assert same_number(1.001, 1.0005)
    assert not same_number(1.0, 1.0011)
    assert not same_number(None, 1.0)
    assert not same_number(None, None)
    assert not same_number(float("inf"), float("inf"))
    # A right number below the tolerance is not met by zero.
    assert same_number(1e-05, 1e-05) and same_number(1.0005e-05, 1e-05)
    assert not same_number(0.0, 1e-05) and not same_number(2e-05, 1e-05) and not same_number(-1e-05, 1e-05)
    assert same_number(0.0005, 0.0) and same_number(0.002, 0.0015)


def test_normalised_questions_fold_case_space_and_punctuation() -> None:
    assert normalise("  Is ICE cold ? ") == normalise("is ice\tcold")
    assert normalise("ice-cream, now!") == normalise("Ice cream now")
    assert normalise("1.5 kg") != normalise("15 kg")
    assert normalise("5 + 3") != normalise("5 = 3")
    assert normalise("Calculate 5 - 3.", punctuation=False) != normalise("Calculate 5 * 3.", punctuation=False)
    assert normalise("A  b", punctuation=False) == normalise("a b", punctuation=False)


def test_every_task_knows_its_hub_data_and_its_splits() -> None:
    names = "gsm8k mawps gsm8k_instruct svamp boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa"
    assert " ".join(BUILTIN) == names
    for task in BUILTIN.values():
        assert task.hub is not None
        assert task.hub[0].count("/") == 1
        assert "test" in task.splits
        assert (task.metric == "generate") == bool(task.until and task.max_new_tokens)
    assert BUILTIN["svamp"].hub_splits["test"] == "train+test"
    assert BUILTIN["piqa"].splits == {"train": "train", "test": "validation"}
