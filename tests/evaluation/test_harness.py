from __future__ import annotations

import dataclasses
import logging
import math
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.oracle import answering_model
from sqft.adapters.attach import load_model
from sqft.data.encode import encode
from sqft.data.tasks import BUILTIN, Example, Task
from sqft.errors import InputError
from sqft.evaluation import lm_model
from sqft.evaluation.harness import _language_model, evaluate_examples, score_examples
from sqft.evaluation.likelihood import answer_pairs, log_likelihoods

EXACT = Task("own", "exact")

ARC = [
    BUILTIN["arc_easy"].build({"question": q, "choices": {"text": c, "label": list("ABCD")[: len(c)]}, "answerKey": k})
    for q, c, k in [
        ("What is ice?", ["water", "a stone", "fire"], "A"),
        ("What burns?", ["ice", "wood"], "B"),
        ("What flies?", ["a bird", "a fish", "a worm"], "A"),
    ]
]
WINOGRANDE = [
    BUILTIN["winogrande"].build({"sentence": s, "option1": o1, "option2": o2, "answer": a})
    for s, o1, o2, a in [
        ("Ann called Bea because _ was lonely.", "Ann", "Bea", "1"),
        ("The cup fell off the shelf as _ shook.", "the cup", "the shelf", "2"),
    ]
]
GSM8K = [
    BUILTIN["gsm8k"].build({"question": "Two and two?", "answer": "2 + 2 = 4\n#### 4"}),
    BUILTIN["gsm8k"].build({"question": "Six and six?", "answer": "6 + 6 = 12\n#### 12"}),
    BUILTIN["gsm8k"].build({"question": "A long day has how many hours?", "answer": "#### 24"}),
    BUILTIN["gsm8k"].build({"question": "Ten times 100?", "answer": "#### 1,000"}),
    BUILTIN["gsm8k"].build({"question": "Six and one?", "answer": "#### 7"}),
]
MAWPS = [
    BUILTIN["mawps"].build({"question": "3 birds and 4 birds", "answer": "7", "seen_template": True}),
    BUILTIN["mawps"].build({"question": "a third of 1", "answer": "0.3333333333", "seen_template": False}),
    BUILTIN["mawps"].build({"question": "5 plus 5", "answer": "10.0", "seen_template": False}),
]
OWN = [
    Example("Spell cat:", " c a t"),
    Example("Spell dog:", " d o g"),
    Example("Spell ox:", " o x"),
    Example("<|user|>hello\n", "hi there"),
    Example("When is leap day?", "2024-02-29"),
]
# What the model says; the comment is whether that is right.
SAYS = [
    (ARC[0].prompt, " water"),  # right
    (ARC[1].prompt, " ice"),  # wrong
    (ARC[2].prompt, " a bird"),  # right
    (WINOGRANDE[0].contexts[0], WINOGRANDE[0].answer),  # right
    (WINOGRANDE[0].contexts[1], " !"),
    (WINOGRANDE[1].contexts[0], WINOGRANDE[1].answer),  # wrong
    (WINOGRANDE[1].contexts[1], " !"),
    (GSM8K[0].prompt, " So 2 + 2 = 4\n#### 4"),  # right: another wording, the right number
    (GSM8K[1].prompt, " 6 + 6 = 12"),  # wrong: no marker
    (GSM8K[2].prompt, " #### 25"),  # wrong number
    (GSM8K[3].prompt, " #### 1000.00 Question: 7"),  # right: cut at 'Question:'
    (GSM8K[4].prompt, " #### 7 of 9\n#### 8"),  # right: the number after the first marker
    (MAWPS[0].prompt, " It is 7."),  # right
    (MAWPS[1].prompt, " 0.333"),  # right: inside the tolerance
    (MAWPS[2].prompt, " 11"),  # wrong
    (OWN[0].prompt, " c a t"),  # right
    (OWN[1].prompt, " d o k"),  # wrong letter
    (OWN[2].prompt, " o x e n"),  # wrong: it goes on
    (OWN[3].prompt, "hi there"),  # right, after a prompt that ends in white space
    (OWN[4].prompt, "2024-02-29"),  # right, though it looks like a date
]


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    torch.set_num_threads(1)
    return answering_model(tiny_tokenizer, SAYS)


@pytest.mark.parametrize(
    ("task", "examples", "right"),
    [
        (BUILTIN["arc_easy"], ARC, [True, False, True]),
        (BUILTIN["winogrande"], WINOGRANDE, [True, False]),
        (BUILTIN["gsm8k"], GSM8K, [True, False, False, True, True]),
        (BUILTIN["mawps"], MAWPS, [True, True, False]),
        (EXACT, OWN, [True, False, False, True, True]),
    ],
    ids=["choice", "contexts", "generate-marker", "generate", "exact"],
)
def test_a_right_answer_scores_one_and_a_wrong_one_zero(
    model: Any, tiny_tokenizer: Any, task: Task, examples: list[Example], right: list[bool]
) -> None:
    task = dataclasses.replace(task, max_new_tokens=min(task.max_new_tokens, 40))
    for batch in (1, 4):
        assert score_examples(model, tiny_tokenizer, task, examples, batch) == right
    # Alone and in another order: no row's score depends on its neighbours.
    assert score_examples(model, tiny_tokenizer, task, examples[::-1], 3) == right[::-1]
    assert score_examples(model, tiny_tokenizer, task, examples[1:2], 3) == right[1:2]


def test_scores_have_mean_standard_error_and_normalised_accuracy(model: Any, tiny_tokenizer: Any) -> None:
    scores = evaluate_examples(model, tiny_tokenizer, BUILTIN["arc_easy"], ARC, 2)
    assert scores.metric == "acc"
    assert scores.value == pytest.approx(2 / 3)
    assert scores.stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))  # √(p(1-p)/(n-1))
    assert set(scores.others) == {"acc_norm"}
    assert not evaluate_examples(model, tiny_tokenizer, BUILTIN["winogrande"], WINOGRANDE, 2).others
    alone = evaluate_examples(model, tiny_tokenizer, EXACT, OWN[:1], 2)
    assert (alone.metric, alone.value, alone.stderr, dict(alone.others)) == ("exact_match", 1.0, None, {})


@pytest.mark.parametrize(
    ("task", "examples"),
    [(BUILTIN["arc_easy"], ARC), (BUILTIN["winogrande"], WINOGRANDE), (EXACT, OWN), (BUILTIN["mawps"], MAWPS)],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_scored_beside_the_choices(
    tiny_model: Any, tiny_tokenizer: Any, task: Task, examples: list[Example], batch: int
) -> None:
    task = dataclasses.replace(task, max_new_tokens=min(task.max_new_tokens, 40))
    model = load_model(tiny_model("llama"))
    pairs = answer_pairs(model, tiny_tokenizer, examples)
    alone = evaluate_examples(model, tiny_tokenizer, task, examples, batch)
    beside = evaluate_examples(model, tiny_tokenizer, task, examples, batch, answers=pairs)
    assert dataclasses.replace(beside, totals=None) == alone
    if task.metric != "generate":
        assert beside.totals == pytest.approx(log_likelihoods(model, pairs, batch), abs=1e-4)
    else:
        assert beside.totals is None


def naive_choice(model: Any, tokenizer: Any, example: Example, *, by_length: bool) -> int:
    """The choice of highest log-likelihood, one forward a choice."""
    scores = []
    for choice in example.choices:
        prompt, answer = encode(tokenizer, example.prompt, choice)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total = sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
        scores.append(total / (len(choice) - 1) if by_length else total)
    return max(range(len(scores)), key=scores.__getitem__)


def test_accuracies_equal_those_of_a_naive_loop(tiny_model: Any, tiny_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    words = ["a", "stone bridge", "rain", "seven tall trees by the river", "it", "an old map"]
    examples = [
        BUILTIN["piqa"].build({"goal": f"goal {i}", "sol1": words[i % 6], "sol2": words[(i * 5 + 1) % 6], "label": 0})
        for i in range(24)
    ]
    scores = evaluate_examples(model, tiny_tokenizer, BUILTIN["piqa"], examples, 5)
    naive = [naive_choice(model, tiny_tokenizer, e, by_length=False) == e.gold for e in examples]
    assert scores.correct == naive
    assert 0 < sum(naive) < len(naive)
    normed = [naive_choice(model, tiny_tokenizer, e, by_length=True) == e.gold for e in examples]
    assert scores.others["acc_norm"] == pytest.approx(sum(normed) / len(normed))
    assert normed != naive


SHAPE = dict(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
UNPADDED: dict[str, dict[str, Any]] = {
    "lfm2": SHAPE | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "qwen3_5_text": SHAPE
    | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    | dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8)
    | dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    "mpt": {"vocab_size": 264, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "expansion_ratio": 2},
}


@pytest.mark.parametrize("name", UNPADDED)
def test_models_that_padding_would_change_answer_as_single_forwards_do(name: str, tiny_tokenizer: Any) -> None:
    from lm_eval.api.instance import Instance
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    ends = {"eos_token_id": tiny_tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **UNPADDED[name], **ends)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform, so that the most likely token is no near tie
    lm = _language_model()(pretrained=model, tokenizer=tiny_tokenizer, batch_size=3)
    begin = "All of these rows begin with the very same words, and then they"
    pairs = [(f"{begin} {'go on ' * row}", f" as {choice}") for row in range(3) for choice in ("rain", "an old map")]
    asked = [Instance("loglikelihood", {}, pair, 0, metadata=("t", row // 2, 1)) for row, pair in enumerate(pairs)]
    with torch.no_grad():
        for (total, _), pair in zip(lm.loglikelihood(asked), pairs, strict=True):
            prompt, answer = encode(tiny_tokenizer, *pair)
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            naive = sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
            assert total == pytest.approx(naive, abs=2e-3)
        options = {"until": ["never said"], "max_gen_toks": 6, "do_sample": False}
        told = [Instance("generate_until", {}, (prompt, options), 0, metadata=("t", 0, 1)) for prompt, _ in pairs]
        for text, (prompt, _) in zip(lm.generate_until(told), pairs, strict=True):
            tokens = encode(tiny_tokenizer, prompt, "")[0]
            length = len(tokens)
            while len(tokens) < length + 6 and tokens[-1] != tiny_tokenizer.eos_token_id:
                tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            assert text == tiny_tokenizer.decode(tokens[length:], skip_special_tokens=True)


class Recorder:
    """Records what lm-eval asks the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, ...]] = []
        for name in ("loglikelihood", "generate_until"):
            original = getattr(_language_model(), name)
            monkeypatch.setattr(_language_model(), name, self._wrap(original))

    def _wrap(self, original: Any) -> Any:
        def recorded(lm: Any, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self.asked += [request.args for request in requests]
            return original(lm, requests, disable_tqdm=disable_tqdm)

        return recorded


def drawn(*texts: str) -> str:
    """Return texts in the order in which lm-eval draws all of them."""
    return "".join(random.Random(1234).sample(texts, len(texts)))


def test_five_shot_prompts_of_gsm8k_are_those_of_lm_evals_own_task(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml
    from datasets import Dataset
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    rows = [{"question": f"What is {n} and {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(24)]
    splits = {"train": Dataset.from_list(rows[:20]), "test": Dataset.from_list(rows[20:])}
    text = (Path(tasks.__file__).parent / "gsm8k" / "gsm8k.yaml").read_text()
    theirs = ConfigurableTask(config={**yaml.safe_load(text), "custom_dataset": lambda **_: splits})
    theirs.set_fewshot_seed(1234)  # what lm_eval's command does where it is given no seed
    theirs.build_all_requests(limit=None, rank=0, world_size=1)
    wanted = [request.args[0] for request in theirs.instances]

    examples = [BUILTIN["gsm8k"].build(row) for row in rows]
    recorder = Recorder(monkeypatch)
    task = dataclasses.replace(BUILTIN["gsm8k"], max_new_tokens=2)
    evaluate_examples(model, tiny_tokenizer, task, examples[20:], 2, examples[:20], 5)
    assert [args[0] for args in recorder.asked] == wanted
    assert len({prompt.rpartition("Question:")[0] for prompt in wanted}) == 4  # other examples for each question


def test_few_shot_prompts_are_worked_examples_before_the_question(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    evaluate_examples(model, tiny_tokenizer, BUILTIN["arc_easy"], ARC[:1], 2, ARC[1:], 2)
    head = drawn("Question: What burns?\nAnswer: wood\n\n", "Question: What flies?\nAnswer: a bird\n\n")
    assert recorder.asked == [(f"{head}{ARC[0].prompt}", f" {c}") for c in ("water", "a stone", "fire")]
    recorder.asked.clear()
    evaluate_examples(model, tiny_tokenizer, BUILTIN["winogrande"], WINOGRANDE[:1], 2, WINOGRANDE[1:], 1)
    head = "The cup fell off the shelf as the shelf shook.\n\nAnn called Bea because "
    assert recorder.asked == [(f"{head}{name}", " was lonely.") for name in ("Ann", "Bea")]
    recorder.asked.clear()
    evaluate_examples(model, tiny_tokenizer, EXACT, OWN[:1], 2, OWN[1:3], 2)
    head = drawn("Spell dog: d o g\n\n", "Spell ox: o x\n\n")
    assert recorder.asked == [(f"{head}Spell cat:", " c a t<|end|>")]
    recorder.asked.clear()
    task = dataclasses.replace(BUILTIN["gsm8k"], max_new_tokens=2)
    evaluate_examples(model, tiny_tokenizer, task, GSM8K[:1], 2, GSM8K[1:2], 1)
    head = "Question: Six and six?\nAnswer: 6 + 6 = 12\n#### 12\n\n"
    assert [args[0] for args in recorder.asked] == [head + GSM8K[0].prompt]


def test_texts_that_look_like_dates_stay_texts(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    score_examples(model, tiny_tokenizer, EXACT, [Example("2024-02-29T00:00:00", " a leap day")], 1)
    assert recorder.asked == [("2024-02-29T00:00:00", " a leap day<|end|>")]


def test_built_in_prompts_get_the_tokens_that_lm_eval_gives_them(model: Any, tiny_tokenizer: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    stock = HFLM(pretrained=model, tokenizer=tiny_tokenizer)
    ours = _language_model()(pretrained=model, tokenizer=tiny_tokenizer)
    pairs = [(e.prompt, c) for e in ARC for c in e.choices] + [(c, e.answer) for e in WINOGRANDE for c in e.contexts]
    pairs += [(e.prompt, e.answer) for e in GSM8K + MAWPS + OWN[:3]]
    for prompt, answer in pairs:
        assert ours._encode_pair(prompt, answer) == stock._encode_pair(prompt, answer)
    # The difference: white space at the prompt's end stays in the prompt, as in training.
    chat = ("<|user|>hello\n", "hi")
    assert stock._encode_pair(*chat)[1] == tiny_tokenizer("\nhi")["input_ids"]
    assert ours._encode_pair(*chat)[1] == tiny_tokenizer("hi")["input_ids"]


def test_generation_reads_the_tokens_of_training(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = lm_model.generate
    monkeypatch.setattr(lm_model, "generate", lambda *options: seen.append(options) or original(*options))
    score_examples(model, tiny_tokenizer, dataclasses.replace(BUILTIN["mawps"], max_new_tokens=3), MAWPS[:1], 1)
    assert seen[0][1] == [encode(tiny_tokenizer, MAWPS[0].prompt, "")[0]]


@pytest.mark.parametrize("name", ["llama", "mpt"])  # with our decoding, and with lm-eval's own
def test_tokens_that_a_tokenizer_appends_do_not_end_a_prompt(name: str, tiny_model: Any, monkeypatch: Any) -> None:
    from lm_eval.api.instance import Instance
    from transformers import AutoModelForCausalLM

    from data.test_encode import framed

    tokenizer = framed("<s> $A </s>")
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name)).eval()
    lm = _language_model()(pretrained=model, tokenizer=tokenizer, batch_size=2)
    assert lm.ours == (name == "llama")
    prompts = ["Spell cat:", "Spell a long word:"]
    rows = [encode(tokenizer, prompt, "")[0] for prompt in prompts]
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in row for row in rows)
    ids, mask = lm.tok_batch_encode(prompts)
    assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == rows
    assert lm.tok_batch_encode(prompts, left_truncate_len=4)[0].tolist() == [row[-4:] for row in rows]

    seen: list[list[int]] = []
    if lm.ours:
        generate = lm_model.generate
        monkeypatch.setattr(lm_model, "generate", lambda *options: seen.extend(options[1]) or generate(*options))
    else:
        generate = lm._model_generate

        def recorded(context: Any, **options: Any) -> Any:
            kept = options["attention_mask"].bool()
            seen.extend(row[part].tolist() for row, part in zip(context, kept, strict=True))
            return generate(context=context, **options)

        monkeypatch.setattr(lm, "_model_generate", recorded)
    options = {"until": ["never said"], "max_gen_toks": 2, "do_sample": False}
    lm.generate_until([Instance("generate_until", {}, (p, options), 0, metadata=("t", 0, 1)) for p in prompts])
    assert sorted(seen) == sorted(rows)


def test_an_answer_that_brings_its_end_is_ended_once(model: Any, tiny_tokenizer: Any, monkeypatch: Any) -> None:
    recorder = Recorder(monkeypatch)
    own = [Example(OWN[0].prompt, " c a t<|end|>")]
    assert score_examples(model, tiny_tokenizer, EXACT, own, 1) == [True]
    assert recorder.asked == [(OWN[0].prompt, " c a t<|end|>")]


def test_prompts_that_the_model_cannot_hold_are_counted(
    model: Any, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    long = Example("x" * 600, " c a t")
    with caplog.at_level(logging.WARNING, "sqft"):
        score_examples(model, tiny_tokenizer, EXACT, [*OWN, long], 2)
    assert "own: 1 of its sequences exceed the model's 512 tokens" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sqft"):
        score_examples(model, tiny_tokenizer, EXACT, OWN, 2)
    assert not caplog.records


def test_scoring_is_quiet_offline_and_leaves_no_trace(
    model: Any,
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Any,
) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("something reaches for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    level = logging.getLogger("lm_eval").level
    model.train()
    score_examples(model, tiny_tokenizer, EXACT, OWN, 2)
    assert model.training
    model.eval()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert logging.getLogger("lm_eval").level == level


def test_nothing_to_evaluate_and_no_end_token_are_refused(model: Any, tiny_tokenizer: Any) -> None:
    import copy

    with pytest.raises(InputError, match="task own: there are no rows to evaluate"):
        score_examples(model, tiny_tokenizer, EXACT, [], 2)
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match="task own: the tokenizer has no end token"):
        score_examples(model, endless, EXACT, OWN, 2)
