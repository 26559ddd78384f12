from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from sqft import artifact
from sqft.artifact import (
    MANIFEST,
    Artifact,
    describe,
    digest_input,
    key_of,
    partial_of,
    reuse,
    writing,
)
from sqft.disk import check_space, write_json
from sqft.errors import InputError
from sqft.locks import run_lock
from sqft.stage import reuse_result, write_result


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345")
    return folder


@pytest.fixture
def description(source):
    return describe("sparsify", {"sparsity": 0.5, "calibration": {"samples": 8}}, {"model": source}, seed=0)


def make(folder, description, content=b"made"):
    with writing(folder, description) as draft:
        (draft.path / "model").write_bytes(content)
        draft.result = {"zeros": 3}
    return Artifact.open(folder)


class TestWriting:
    def test_the_folder_appears_at_the_end(self, tmp_path, description):
        folder = tmp_path / "sparse"
        with writing(folder, description) as draft:
            (draft.path / "model").write_bytes(b"made")
            assert draft.path == partial_of(folder) == tmp_path / ".partial-sparse"
            assert not folder.exists()
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
            "model",
            "sqft/manifest.json",
        ]
        assert not partial_of(folder).exists()

    def test_the_manifest_says_what_it_was_made_from_and_cost(self, tmp_path, description):
        manifest = make(tmp_path / "sparse", description).manifest
        assert {name: manifest[name] for name in description} == description
        assert manifest["key"] == key_of(description)
        assert list(manifest["files"]) == ["model"]
        assert manifest["size_bytes"] == len(b"made")
        assert manifest["result"] == {"zeros": 3}
        assert manifest["seconds"] >= 0
        assert manifest["peak_memory_bytes"] > 1e6
        assert manifest["versions"]["torch"].startswith("2.")

    def test_two_processes_do_not_make_one_folder(self, tmp_path, description):
        with writing(tmp_path / "sparse", description) as draft:
            (draft.path / "model").write_bytes(b"first")
            with (
                pytest.raises(InputError, match="another sqft process is making it"),
                writing(tmp_path / "sparse", description),
            ):
                raise AssertionError("both at work")
        assert (tmp_path / "sparse" / "model").read_bytes() == b"first"
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    def test_nothing_is_left_after_an_error(self, tmp_path, description):
        folder = tmp_path / "sparse"
        with pytest.raises(ZeroDivisionError), writing(folder, description) as draft:
            (draft.path / "model").write_bytes(b"half")
            _ = 1 / 0
        assert not folder.exists()
        assert not partial_of(folder).exists()

    def test_checkpoints_are_kept_and_are_no_part_of_the_result(self, tmp_path, description):
        folder = tmp_path / "adapter"
        with pytest.raises(KeyboardInterrupt), writing(folder, description) as draft:
            draft.checkpoints.mkdir()
            (draft.checkpoints / "step").write_bytes(b"step 3")
            (draft.path / "half").write_bytes(b"half")
            raise KeyboardInterrupt
        assert not folder.exists()
        assert reuse(folder, description) is None
        with writing(folder, description) as draft:
            assert (draft.checkpoints / "step").read_bytes() == b"step 3"
            assert not (draft.path / "half").exists()
            (draft.path / "model").write_bytes(b"made")
        assert list(Artifact.open(folder).manifest["files"]) == ["model"]
        assert sorted(p.name for p in folder.iterdir()) == ["model", "sqft"]

    def test_old_partial_work_is_dropped_where_a_stage_starts_anew(self, tmp_path, description):
        folder = tmp_path / "sparse"
        partial_of(folder).mkdir()
        (partial_of(folder) / "stale").write_bytes(b"")
        make(folder, description)
        assert not (folder / "stale").exists()

    def test_an_existing_folder_is_never_overwritten(self, tmp_path, description):
        folder = tmp_path / "sparse"
        make(folder, description)
        with pytest.raises(InputError, match="already exists"), writing(folder, description):
            pass
        assert (folder / "model").read_bytes() == b"made"

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            SafetensorError("I/O error: No space left on device (os error 28)"),
        ],
    )
    def test_a_full_disk_is_said_and_leaves_nothing(self, tmp_path, description, error):
        folder = tmp_path / "sparse"
        with pytest.raises(InputError, match=r"the disk is full; free some space and run the same command again"):
            with writing(folder, description) as draft:
                (draft.path / "model").write_bytes(b"half")
                raise error
        assert list(tmp_path.glob("*sparse*")) == []

    def test_a_disk_that_fills_up_at_the_manifest(self, tmp_path, description, monkeypatch):
        folder = tmp_path / "sparse"
        write = artifact.write_json

        def full(path, value):
            if path.name == MANIFEST.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(path, value)

        monkeypatch.setattr(artifact, "write_json", full)
        with pytest.raises(InputError, match="the disk is full"):
            make(folder, description)
        assert list(tmp_path.glob("*sparse*")) == []

    def test_other_os_errors_are_not_disguised(self, tmp_path, description):
        with pytest.raises(PermissionError), writing(tmp_path / "sparse", description):
            raise PermissionError(errno.EACCES, "no")

    def test_a_killed_process_leaves_no_stage_folder(self, tmp_path, source):
        folder = tmp_path / "sparse"
        code = (
            "import os, signal, sys; from pathlib import Path; from sqft.artifact import *\n"
            "folder, source = map(Path, sys.argv[1:])\n"
            "with writing(folder, describe('s', {}, {'model': source}, 0)) as draft:\n"
            "    (draft.path / 'model').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        result = subprocess.run([sys.executable, "-c", code, str(folder), str(source)], check=False)
        assert result.returncode == -9
        assert not folder.exists()
        description = describe("s", {}, {"model": source}, 0)
        assert reuse(folder, description) is None
        assert make(folder, description).manifest["files"].keys() == {"model"}


class TestKey:
    def test_it_does_not_depend_on_paths(self, tmp_path, source):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "weights").write_bytes(b"12345")
        one, two = (describe("s", {"a": 1}, {"model": folder}, 0) for folder in (source, elsewhere))
        assert one != two
        assert key_of(one) == key_of(two)

    def test_it_does_not_depend_on_the_order_of_settings(self, source):
        one, two = (describe("s", config, {"model": source}, 0) for config in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
        assert key_of(one) == key_of(two)

    @pytest.mark.parametrize("change", [{"stage": "t"}, {"config": {"a": 2}}, {"seed": 1}])
    def test_it_depends_on_all_else(self, source, change):
        one = describe("s", {"a": 1}, {"model": source}, 0)
        assert key_of(one) != key_of({**one, **change})

    def test_it_depends_on_the_content_of_inputs(self, source):
        one = describe("s", {}, {"model": source}, 0)
        (source / "weights").write_bytes(b"1234567")
        assert key_of(one) != key_of(describe("s", {}, {"model": source}, 0))

    def test_a_missing_input_has_no_key(self, tmp_path):
        with pytest.raises(InputError, match="no such file or folder"):
            digest_input(tmp_path / "none")

    def test_a_stage_folder_is_known_by_its_own_digest(self, tmp_path, description):
        made = make(tmp_path / "sparse", description)
        assert digest_input(made.path) == made.digest
        other = make(tmp_path / "other", description, b"different")
        assert other.digest != made.digest

    def test_hidden_files_do_not_count(self, source):
        before = digest_input(source)
        (source / ".cache").mkdir()
        (source / ".cache" / "x").write_bytes(b"x")
        assert digest_input(source) == before


class TestFinished:
    def test_not_yet(self, tmp_path, description):
        assert reuse(tmp_path / "sparse", description) is None

    def test_a_folder_with_the_same_key_is_taken(self, tmp_path, description):
        made = make(tmp_path / "sparse", description)
        assert reuse(made.path, description) == made

    def test_another_recipes_folder_is_refused_with_what_differs(self, tmp_path, source, description):
        made = make(tmp_path / "sparse", description)
        wanted = describe("sparsify", {"sparsity": 0.7, "calibration": {"samples": 8}, "new": 1}, {"model": source}, 3)
        with pytest.raises(InputError) as caught:
            reuse(made.path, wanted)
        text = str(caught.value)
        assert "sparse belongs to another recipe (delete it to make it again, or choose another --out)" in text
        assert "sparsity was 0.5, is now 0.7" in text
        assert "seed was 0, is now 3" in text
        assert "new was 'absent', is now 1" in text
        assert "samples" not in text

    def test_a_setting_that_is_gone_is_named(self, tmp_path, source, description):
        made = make(tmp_path / "sparse", description)
        with pytest.raises(InputError, match=r"calibration.samples was 8, is now 'absent'"):
            reuse(made.path, describe("sparsify", {"sparsity": 0.5, "calibration": {}}, {"model": source}, 0))

    def test_a_changed_input_is_named(self, tmp_path, source, description):
        made = make(tmp_path / "sparse", description)
        (source / "weights").write_bytes(b"123456789")
        wanted = describe("sparsify", description["config"], {"model": source}, 0)
        with pytest.raises(InputError, match=r"its input model \(.*source\) has changed"):
            reuse(made.path, wanted)

    def test_another_recipes_unfinished_work_is_refused(self, tmp_path, source, description):
        folder = tmp_path / "adapter"
        wanted = describe("sparsify", {**description["config"], "sparsity": 0.7}, {"model": source}, 0)
        with pytest.raises(MemoryError), writing(folder, description):
            raise MemoryError
        assert reuse(folder, wanted) is None  # nothing was made that could be lost
        with pytest.raises(KeyboardInterrupt), writing(folder, description) as draft:
            draft.checkpoints.mkdir()
            (draft.checkpoints / "step").touch()
            raise KeyboardInterrupt
        with pytest.raises(
            InputError, match=r"\.partial-adapter belongs to another recipe .*sparsity was 0.5, is now 0.7"
        ):
            reuse(folder, wanted)

    def test_a_document_or_an_adapter_beside_a_model_does_not_change_it(self, source, description):
        (source / "README.md").write_text("mended")
        (source / "adapter").mkdir()
        (source / "adapter" / "adapter_config.json").write_text("{}")
        assert describe("sparsify", description["config"], {"model": source}, 0) == description

    def test_a_mask_or_a_named_chat_template_does(self, source):
        before = digest_input(source)
        for name in ("sqft/mask.safetensors", "additional_chat_templates/tool_use.jinja"):
            (source / name).parent.mkdir()
            (source / name).write_bytes(b"x")
            assert digest_input(source) != before
            before = digest_input(source)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: (f / "model").write_bytes(b"other"), "model has changed"),
            (lambda f: (f / "model").unlink(), "model is gone"),
            (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter_config\.json was added"),
            (lambda f: (f / "sqft" / "mask.safetensors").write_bytes(b"m"), r"mask\.safetensors was added"),
            (lambda f: (f / "sqft" / "manifest.json").write_text("[]"), "has no readable"),
        ],
    )
    def test_a_folder_that_is_not_what_its_manifest_says_is_refused(self, change, message, tmp_path, description):
        made = make(tmp_path / "sparse", description)
        (made.path / "README.md").write_text("a document")
        assert digest_input(made.path) == made.digest
        change(made.path)
        for use in (lambda: digest_input(made.path), lambda: reuse(made.path, description)):
            with pytest.raises(InputError, match=message):
                use()

    def test_a_strangers_folder_is_refused(self, source, description):
        with pytest.raises(InputError, match=r"has no readable sqft/manifest.json; it was not written by sqft"):
            reuse(source, description)


class TestResults:
    def test_a_result_is_found_again(self, tmp_path, description):
        path = tmp_path / "verify.json"
        assert reuse_result(path, description) is None
        written = write_result(path, description, {"passed": True})
        assert reuse_result(path, description) == written == json.loads(path.read_text())
        assert written["passed"] is True
        assert "torch" in written["versions"]

    def test_one_of_another_recipe_is_refused(self, tmp_path, description):
        path = tmp_path / "verify.json"
        write_result(path, description, {"passed": True})
        with pytest.raises(InputError, match="seed was 0, is now 5"):
            reuse_result(path, {**description, "seed": 5})

    @pytest.mark.parametrize("text", ["{", "[]", '{"passed": true}'])
    def test_a_strangers_file_is_refused(self, tmp_path, description, text):
        path = tmp_path / "verify.json"
        path.write_text(text)
        with pytest.raises(InputError, match=r"verify.json: not written by sqft"):
            reuse_result(path, description)

    def test_json_is_whole_or_unchanged(self, tmp_path):
        path = tmp_path / "x.json"
        write_json(path, {"a": 1})
        with pytest.raises(TypeError):
            write_json(path, {"a": 2, "b": object()})
        assert json.loads(path.read_text()) == {"a": 1}


class TestLock:
    def test_one_process_at_a_time(self, tmp_path):
        with run_lock(tmp_path / "run"):
            with pytest.raises(InputError, match="another sqft process works there"), run_lock(tmp_path / "run"):
                pass
        with run_lock(tmp_path / "run"):
            pass

    def test_a_killed_process_releases_it(self, tmp_path):
        code = (
            "import os, signal, sys; from pathlib import Path; from sqft.locks import run_lock\n"
            "with run_lock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
        with run_lock(tmp_path):
            pass

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be used as output folder"), run_lock(tmp_path / "file" / "run"):
            pass


def test_space_is_checked_before_the_work(tmp_path):
    check_space(tmp_path / "not" / "yet", 1, "sparsify")
    with pytest.raises(InputError, match=r"sparsify needs 1000000000\.00 GB of disk and .* GB are free"):
        check_space(tmp_path / "not" / "yet", 10**18, "sparsify")
