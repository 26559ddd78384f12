"""Built-in tasks: where their rows are, how a row reads, and how an answer is judged.

ONE function per task turns a row into an :class:`Example`; training, calibration and evaluation all call it, so a model
is never tuned on one prompt and judged on another. Prompts are those of lm-eval's zero-shot tasks, which the paper
evaluates with and which the reference trains on; MAWPS and SVAMP use the instruction prompt of LLM-Adapters.

Metrics
- `choice`: the choice of highest log-likelihood is the right one (lm-eval multiple_choice, acc; acc_norm divides by the
  choice's length in characters).
- `generate`: greedy generation; the last number of the text is within 0.001 of the right one, and of a right one below
  0.001 within a thousandth of it. With a marker such as GSM8K's `####` it is the number that follows the marker and a
  space, the first one that does so, as in lm-eval's strict-match. No such number is a wrong answer. `1,234.5e3` and
  `−5` are read as a person reads them; in `x2e5` the e is a letter.
- `perplexity`: exp of the mean negative log-likelihood of a text's tokens (:mod:`sqft.evaluation.perplexity`).
- `exact`: greedy decoding would yield exactly the answer and then the end token. One forward decides it: the answer is
  greedy if each of its tokens is the most likely one after the tokens before it. A generated task that accepts several
  answers is scored on its one stored answer.

Differs from the reference:
- the indentation of its source code leaks into its instruction prompts, 24 spaces a line in training and 28 in
  evaluation; here there is none, and both are equal. It has a second wording for Phi-3; here all models read one.
- MAWPS trains on the row's equation as its rationale (` (22-14)/4 = 2`; the number alone where it has none that is
  solved for the answer): the rationales of LLM-Adapters were made up by a larger model. Numbers keep four decimals, far
  inside the tolerance.
- LLM-Adapters' prompt ends with a line end after `### Response:`, and the answer begins the next line; here it follows
  after a space.
- `gsm8k_instruct` is GSM8K with LLM-Adapters' prompt and answer extraction, for math instruction tuning; it trains on
  the row's own solution without the calculator's marks.
- SVAMP bodies without a final full stop get one.
- a hyphen between two digits is a minus only for the reference (`9-5` ends in -5 there, in 5 here); `.5` is a half.
- WinoGrande trains on the part after the blank given each row's right option, as it is scored.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Metric = Literal["choice", "generate", "exact", "perplexity"]
Split = Literal["train", "validation", "test"]
SPLITS: Mapping[Split, str] = {"train": "train", "validation": "validation", "test": "test"}
Row = Mapping[str, Any]

TOLERANCE = 0.001
# An exponent follows a number that no letter precedes: x2e5 is a name. It is whole: 1e5.5 is none.
_EXPONENT = r"[eE][-+]?\d+(?!\d|\.\d)"
_NUMBER = re.compile(rf"(?<![\d.])-?(?:(?<![A-Za-z])(?:\d+\.?\d*|\.\d+){_EXPONENT}|\d+\.?\d*|\.\d+)")
_MINUS = str.maketrans(dict.fromkeys("\N{MINUS SIGN}\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}", "-"))
_ARITHMETIC = re.compile(r"[-+*/().\d\s]+")
_CALCULATOR = re.compile(r"<<.*?>>")
_SENTENCE_END = re.compile(r"(.*[.!?][\"')\]]*) (\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A prompt with its right answer.

    Attributes:
        prompt: what the model reads.
        answer: what it should write next, with its leading space.
        choices: the possible answers, each with its leading space, of a `choice` task.
        gold: index of the right choice.
        contexts: prompts that take the place of choices where those share one continuation (WinoGrande).
        question: by what two rows are the same for the split guard; the prompt if empty.
        tags: subsets of the task that are reported apart.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    gold: int | None = None
    contexts: tuple[str, ...] = ()
    question: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task: its rows' place, wording and metric.

    Attributes:
        name: name in results.
        metric: see the module's docstring.
        build: turns a row into an example; None for your own data, whose columns differ.
        splits: our split to that of the source; a split that is absent does not exist anywhere.
        hub: Hub data set and configuration.
        folder: name of its folder of local files; empty is the task's own.
        rows: path of the rows of a task file; empty where they come from elsewhere.
        hub_splits: where the Hub's split is called otherwise than the local file.
        acc_norm: whether accuracy by length is reported too: where lm-eval does, not between 'yes' and 'no'.
        marker: text that the answer's number follows, after a space.
        until: texts that end a generation, besides the end token.
        max_new_tokens: tokens of a generation at most.
        fold_punctuation: whether the split guard ignores punctuation; off where it carries the question's meaning.
        version: rises when prompt or metric changes, so that old numbers are not compared with new ones.
    """

    name: str
    metric: Metric
    build: Callable[[Row], Example] | None = None
    splits: Mapping[Split, str] = field(default_factory=dict)
    hub: tuple[str, str | None] | None = None
    folder: str = ""
    rows: str = ""
    hub_splits: Mapping[Split, str] = field(default_factory=dict)
    acc_norm: bool = False
    marker: str = ""
    until: tuple[str, ...] = ()
    max_new_tokens: int = 0
    fold_punctuation: bool = True
    version: int = 1


def judged_digest(task: Task, examples: Sequence[Example]) -> str:
    """Return a digest of rows and of how they are asked and judged: what a score depends on besides the model."""
    asked = {name: getattr(task, name) for name in ("name", "metric", "acc_norm", "marker", "until", "max_new_tokens")}
    rows = [asdict(example) for example in examples]
    return hashlib.sha256(json.dumps([asked, task.version, rows]).encode()).hexdigest()


def normalise(text: str, *, punctuation: bool = True) -> str:
    """Return a text by which two wordings of one question are equal: case and white space folded.

    Args:
        text: a question.
        punctuation: fold punctuation to white space too. Symbols such as + and = stay.
    """
    text = text.casefold()
    if punctuation:
        text = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    return " ".join(text.split())


def question_key(example: Example, *, punctuation: bool) -> str:
    """Return by what two rows ask the same question; `punctuation` as for :func:`normalise`."""
    return normalise(example.question or example.prompt, punctuation=punctuation)


def final_number(text: str, marker: str = "") -> float | None:
    """Return the last number of a text, or with a marker the first that follows one and a space; None without any."""
    text = text.translate(_MINUS)
    if marker:
        # The pattern of lm-eval's gsm8k (strict-match), and an exponent.
        found = re.search(re.escape(marker.rstrip()) + rf" (-?[0-9.,]+(?:{_EXPONENT})?)", text)
        text = found[1].rstrip(".,") if found else ""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def same_number(predicted: float | None, right: float | None) -> bool:
    """Return whether two numbers agree within the tolerance; no number agrees with none.

    Of a right number that is smaller than the tolerance itself the tolerance is that share: zero is not 1e-05.
    """
    if predicted is None or right is None:
        return False
    return abs(predicted - right) <= TOLERANCE * (abs(right) if 0 < abs(right) < TOLERANCE else 1)


def _multiple_choice(prompt: str, choices: list[str], gold: int, question: str) -> Example:
    if not 0 <= gold < len(choices):
        raise ValueError(f"its label {gold} names none of its {len(choices)} choices")
    answers = tuple(f" {choice}" for choice in choices)
    return Example(prompt, answers[gold], answers, gold, question=question)


def _instruction(question: str) -> str:
    return (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{question}\n\n### Response:"
    )


def _short_number(value: str | float) -> str:
    number = f"{float(value):.4f}".rstrip("0").rstrip(".")
    # Four decimals of 1e-05 are another number.
    return number if same_number(float(number), float(value)) else str(value)


def _gsm8k(row: Row) -> Example:
    return Example(f"Question: {row['question']}\nAnswer:", f" {row['answer']}", question=row["question"])


def _mawps(row: Row) -> Example:
    answer = row["answer"] if "answer" in row else row["result_float"]
    tags = ("unseen",) if row.get("seen_template") is False else ()
    text = _rationale(row, _short_number(answer))
    return Example(_instruction(row["question"]), text, question=row["question"], tags=tags)


def _rationale(row: Row, answer: str) -> str:
    """Return the answer after the equation that gives it, or alone where there is none of the form `x=...`."""
    unknown, _, right = str(row.get("equation") or "").partition("=")
    if not unknown.strip().isalpha() or not _ARITHMETIC.fullmatch(right):
        return f" {answer}"
    expression = re.sub(r"\d+\.\d+", lambda number: _short_number(number[0]), "".join(right.split()))
    return f" {_without_outer_brackets(expression)} = {answer}"


def _without_outer_brackets(expression: str) -> str:
    depth = 0
    for place, character in enumerate(expression):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and place < len(expression) - 1:
            return expression
    return expression.removeprefix("(").removesuffix(")") if expression.startswith("(") else expression


def _gsm8k_instruct(row: Row) -> Example:
    solution, _, number = _CALCULATOR.sub("", row["answer"]).rpartition("####")
    answer = f"{solution.strip()}\nThe answer is {number.strip()}" if solution else number.strip()
    return Example(_instruction(row["question"]), f" {answer}", question=row["question"])


def _svamp(row: Row) -> Example:
    body = row["Body"].strip()
    stop = "" if body.endswith((".", "!", "?")) else "."
    question = f"{body}{stop} {row['Question'].strip()}"
    return Example(_instruction(question), f" {_short_number(row['Answer'])}", question=question)


def _boolq(row: Row) -> Example:
    prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return _multiple_choice(prompt, ["no", "yes"], int(row["answer"]), row["question"])


def _piqa(row: Row) -> Example:
    prompt = f"Question: {row['goal']}\nAnswer:"
    return _multiple_choice(prompt, [row["sol1"], row["sol2"]], int(row["label"]), row["goal"])


def _label_index(row: Row) -> int:
    labels, key = list(row["choices"]["label"]), row["answerKey"].strip()
    if key not in labels:
        raise ValueError(f"its answerKey {key!r} is none of its labels {labels}")
    return labels.index(key)


def _arc(row: Row) -> Example:
    prompt = f"Question: {row['question']}\nAnswer:"
    return _multiple_choice(prompt, list(row["choices"]["text"]), _label_index(row), row["question"])


def _openbookqa(row: Row) -> Example:
    stem = row["question_stem"]
    return _multiple_choice(stem, list(row["choices"]["text"]), _label_index(row), stem)


def _clean_hellaswag(text: str) -> str:
    """Remove the marks that WikiHow's pages left, as lm-eval does."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _join_hellaswag(row: Row) -> str:
    """Return the prompt of a row of the Hub (activity_label, ctx_a, ctx_b) or of the joined form (ctx alone).

    The Hub's prompt capitalises ctx_b, the beginning of the sentence to complete. The joined form no longer says where
    ctx_b begins: it is the lower-case text after the last full sentence. An abbreviation inside ctx_b misleads this.
    """
    if "ctx_a" in row:
        return _clean_hellaswag(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    context = str(row["ctx"])
    parts = _SENTENCE_END.fullmatch(context)
    if parts is None or context.endswith((".", "!", "?")) or not parts[2][0].islower():
        return context
    return f"{parts[1]} {parts[2].capitalize()}"


def _hellaswag(row: Row) -> Example:
    prompt = _join_hellaswag(row)
    return _multiple_choice(prompt, [_clean_hellaswag(e) for e in row["endings"]], int(row["label"]), prompt)


def _winogrande(row: Row) -> Example:
    before, blank, after = row["sentence"].partition("_")
    if not blank or row["answer"] not in ("1", "2"):
        raise ValueError("its sentence has no blank '_', or its answer is neither '1' nor '2'")
    contexts, gold = (before + row["option1"], before + row["option2"]), int(row["answer"]) - 1
    return Example(contexts[gold], f" {after.strip()}", gold=gold, contexts=contexts, question=row["sentence"])


_TWO: dict[Split, str] = {"train": "train", "test": "test"}
# The test labels of these are secret: their validation split is what everybody reports.
_OPEN: dict[Split, str] = {"train": "train", "test": "validation"}
_MATH: dict[str, Any] = {"until": ("\n\n", "###"), "max_new_tokens": 64}

BUILTIN: dict[str, Task] = {
    task.name: task
    for task in (
        # 400 tokens: with SmolLM2's tokenizer 5 of its 8,792 answers are longer; 234 exceed lm-eval's 256.
        Task(
            "gsm8k",
            "generate",
            _gsm8k,
            _TWO,
            ("openai/gsm8k", "main"),
            marker="####",
            until=("Question:",),
            max_new_tokens=400,
            version=2,
        ),
        # The Hub's copy has other splits (520 test rows, filtered for leaks): its numbers are not those of the folder.
        Task("mawps", "generate", _mawps, SPLITS, ("MU-NLPC/Calc-mawps", None), **_MATH, version=2),
        Task(
            "gsm8k_instruct",
            "generate",
            _gsm8k_instruct,
            _TWO,
            ("openai/gsm8k", "main"),
            folder="gsm8k",
            until=("###",),
            max_new_tokens=400,
        ),
        Task(
            "svamp",
            "generate",
            _svamp,
            {"test": "test"},
            ("ChilleD/SVAMP", None),
            hub_splits={"test": "train+test"},
            **_MATH,
        ),
        Task("boolq", "choice", _boolq, _OPEN, ("google/boolq", None)),
        Task("piqa", "choice", _piqa, _OPEN, ("baber/piqa", None), acc_norm=True),
        Task("hellaswag", "choice", _hellaswag, _OPEN, ("Rowan/hellaswag", None), acc_norm=True),
        Task("winogrande", "choice", _winogrande, _OPEN, ("allenai/winogrande", "winogrande_debiased")),
        Task("arc_easy", "choice", _arc, SPLITS, ("allenai/ai2_arc", "ARC-Easy"), acc_norm=True),
        Task("arc_challenge", "choice", _arc, SPLITS, ("allenai/ai2_arc", "ARC-Challenge"), acc_norm=True),
        Task("openbookqa", "choice", _openbookqa, SPLITS, ("allenai/openbookqa", "main"), acc_norm=True),
    )
}


PERPLEXITY = Task("wikitext2", "perplexity", splits={"validation": "valid", "test": "test"})

# Several tasks tuned on together and evaluated one by one. `a+b` makes any other mix of built-in tasks.
MIXES: dict[str, tuple[str, ...]] = {
    "math": ("gsm8k_instruct", "mawps", "svamp"),
    "commonsense": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}


def mix_members(name: str) -> tuple[str, ...]:
    """Return the built-in tasks that a mix's name stands for; none if it names no mix."""
    if name in MIXES:
        return MIXES[name]
    parts = tuple(name.split("+"))
    return parts if len(parts) > 1 and all(part in BUILTIN for part in parts) else ()
