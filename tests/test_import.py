"""`import sqft` is cheap and changes nothing of PEFT, which loads masked adapters whichever is imported first."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.post_import import when_imported

ADAPTER = """
from transformers import AutoModelForCausalLM
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {adapter!r})
kinds = {{module.kind for module in model.modules() if hasattr(module, "mask_packed")}}
assert kinds == {{"sparse"}}, kinds
"""
ORDERS = {
    "sqft first": "import sqft, peft",
    "peft first": "import peft, sqft",
    "sqft first, and peft looked for": "import importlib.util, sqft; importlib.util.find_spec('peft'); import peft",
    "a part of peft first": "import sqft, peft.tuners.lora.layer, peft",
    "a room of sqft first": "import sqft.adapters.saved, peft",
}


# Runs each script of its arguments in a fork that has torch and transformers, as users' programs have, and no peft.
FORKS = """
import json, os, sys, tempfile, traceback
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
assert not {"peft", "sqft"} & sys.modules.keys()
found = []
for script in sys.argv[1:]:
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 2)
            try:
                exec(script, {})
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        found.append((code, said.read().decode()))
print(json.dumps(found))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def endings(loading: str) -> dict[str, tuple[int, str]]:
    """How each order of imports ends: its exit code, and what it said."""
    orders = {**ORDERS, "peft alone": "import peft"}
    done = python(FORKS, *(order + loading for order in orders.values()))
    assert done.returncode == 0, done.stderr
    return dict(zip(orders, map(tuple, json.loads(done.stdout)), strict=True))


@pytest.fixture(scope="module")
def loading(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A script that loads a saved masked adapter with PEFT."""
    from peft import get_peft_model

    from sqft import SqftConfig, load_model

    base, folder = tiny_model("llama"), tmp_path_factory.mktemp("masked")
    config = SqftConfig(task_type="CAUSAL_LM", kind="sparse", r=4, target_modules=["q_proj"])
    get_peft_model(load_model(base), config).save_pretrained(str(folder))
    return ADAPTER.format(base=str(base), adapter=str(folder))


def test_importing_sqft_imports_no_library() -> None:
    done = python("import sqft, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))")
    loaded = set(eval(done.stdout))
    assert "sqft" in loaded
    assert not loaded & {"torch", "peft", "transformers", "numpy", "pydantic", "yaml", "rich"}


@pytest.mark.parametrize("order", ORDERS)
def test_peft_loads_a_masked_adapter(order: str, endings: dict[str, tuple[int, str]]) -> None:
    assert endings[order][0] == 0, endings[order][1]


def test_it_loads_where_nothing_was_imported_before(loading: str) -> None:
    done = python(ORDERS["sqft first"] + loading)
    assert done.returncode == 0, done.stderr


def test_stock_peft_refuses_it(endings: dict[str, tuple[int, str]]) -> None:
    code, said = endings["peft alone"]
    assert code != 0
    assert "KeyError: 'SQFT'" in said


def test_no_attribute_of_a_peft_class_or_module_changes() -> None:
    script = """
import sys, importlib, pkgutil, peft, peft.tuners.lora, transformers.pytorch_utils
modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"]
def state():
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {thing: dict(vars(thing)) for thing in (*classes, *modules)}
before = state()
import sqft.adapters.attach, sqft.adapters.elastic, sqft.adapters.merged
after, tables = state(), []
for thing, attributes in before.items():
    for name, value in attributes.items():
        assert after[thing][name] is value, (thing, name)
assert len(before) > 100
print(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["SQFT"].__name__)
"""
    done = python(script)
    assert done.stdout == "SqftConfig\n", done.stderr


def test_an_action_runs_once_after_the_module_and_again_after_an_import_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "slow_library_xyz.py"
    seen: list[object] = []
    finders = list(sys.meta_path)
    when_imported("slow_library_xyz", lambda: seen.append(sys.modules["slow_library_xyz"].value))
    module.write_text("raise RuntimeError('broken')")
    with pytest.raises(RuntimeError, match="broken"):
        __import__("slow_library_xyz")
    assert not seen
    module.write_text("value = 'whole, and of another size'")
    __import__("slow_library_xyz")
    assert seen == ["whole, and of another size"]
    assert sys.meta_path == finders
    __import__("slow_library_xyz")
    assert len(seen) == 1
    when_imported("slow_library_xyz", lambda: seen.append("at once"))
    assert seen[1:] == ["at once"]
    sys.modules.pop("slow_library_xyz")
