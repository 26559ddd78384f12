"""The serving test itself, without vLLM: it must tell a broken model from a near tie, and leave no server behind."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import serve_vllm
import vllm_server
from vllm_server import ServingError

# transformers chose 5, 6, 7; at each step 5, 6 and 7 are near each other and 9 is two logits below.
ROW = {"tokens": [5, 6, 7], "top_ids": [[5, 6, 9], [6, 7, 9], [7, 5, 9]], "top_logits": [[3.0, 2.9, 1.0]] * 3}


def test_equal_tokens_agree():
    assert serve_vllm.judge(ROW, [5, 6, 7], 0.5) == {"verdict": "equal", "agreed": 3}


def test_a_small_gap_is_a_near_tie_and_only_below_the_threshold():
    result = serve_vllm.judge(ROW, [5, 7, 1], 0.5)
    assert (result["verdict"], result["agreed"]) == ("near tie", 1)
    assert result["gap"] == pytest.approx(0.1)
    assert serve_vllm.judge(ROW, [5, 7, 1], 0.05)["verdict"] == "mismatch"


def test_a_token_far_below_a_near_tie_is_a_mismatch():
    result = serve_vllm.judge(ROW, [5, 6, 9], 0.5)
    assert result["verdict"] == "mismatch"
    assert (result["gap"], result["top2_gap"]) == (2.0, pytest.approx(0.1))


def test_a_token_outside_the_kept_logits_is_a_mismatch_whatever_the_threshold():
    result = serve_vllm.judge(ROW, [42, 6, 7], 100)
    assert result["verdict"] == "mismatch"
    assert result["gap_is_at_least"]


@pytest.mark.parametrize("served", [[5, 6], [5, 6, 7, 8], []])
def test_another_length_is_a_mismatch(served):
    assert serve_vllm.judge(ROW, served, 0.5)["verdict"] == "mismatch"


def test_tokens_after_the_end_of_text_are_not_compared():
    assert serve_vllm.until_end([5, 2, 9, 2], [2]) == [5, 2]
    assert serve_vllm.until_end([5, 9], [2]) == [5, 9]
    assert serve_vllm.judge({**ROW, "tokens": [5, 6]}, [5, 7], 0.5)["verdict"] == "near tie"


def quantized(**weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "symmetric": False, "group_size": 64, **weights}}},
    }


def test_kinds_of_models(tmp_path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text("{}")
    assert serve_vllm.check_model(tmp_path) == "bf16"
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantized()}))
    assert serve_vllm.check_model(tmp_path) == "INT4 asymmetric group 64"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (quantized(num_bits=8), "weights of 8 bits"),
        ({**quantized(), "sparsity_config": {"format": "dense"}}, "sparsity_config"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_what_is_not_served_is_refused_before_anything_starts(tmp_path, config, said):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(ServingError, match=said):
        serve_vllm.check_model(tmp_path)


def test_a_prompt_file_is_read_or_its_line_is_named(tmp_path):
    assert len(serve_vllm.read_prompts(None)) >= 20
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    assert serve_vllm.read_prompts(file) == ["one", "two"]
    file.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(ServingError, match="line 2"):
        serve_vllm.read_prompts(file)


def fake_python(folder: Path, body: str) -> Path:
    """Write a stand-in for vLLM's interpreter: its arguments are those of the server."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{body}")
    script.chmod(0o755)
    return script


SERVER = """
import http.server, json, os, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "%d"}' % os.getpid())
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        for token in (7, 8):
            step = {"tokens": ["token_id:%d" % token], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -1}]}
            event = json.dumps({"choices": [{"logprobs": step}]})
            self.wfile.write(f"data: {event}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.parametrize("raised", [None, KeyboardInterrupt])
def test_the_server_is_asked_and_always_stopped(tmp_path, monkeypatch, raised):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = None
    try:
        with vllm_server.serving(fake_python(tmp_path, SERVER), tmp_path, 1, False, 60) as (url, _):
            process = int(vllm_server.version(url))
            answer = vllm_server.complete(url, [1, 2], 2)
            assert (answer["tokens"], answer["logprobs"], answer["top2_gaps"]) == ([7, 8], [-0.5] * 2, [0.5] * 2)
            if raised:
                raise raised
    except KeyboardInterrupt:
        assert raised
    for _ in range(50):
        if not os.path.exists(f"/proc/{process}"):
            break
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{process}")


def test_a_server_that_dies_is_reported_with_what_its_log_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    broken = fake_python(tmp_path, "raise ValueError('Unsupported num_bits = 9')")
    with pytest.raises(ServingError, match=r"exit code 1.*\n.*Unsupported num_bits = 9"):
        with vllm_server.serving(broken, tmp_path, 1, False, 60):
            pass


def test_a_server_that_never_answers_is_given_up_and_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    silent = fake_python(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(ServingError, match="--timeout"):
        with vllm_server.serving(silent, tmp_path, 1, False, 1):
            pass
