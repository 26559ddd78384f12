"""A stand-in for optimum-intel: it writes what the stand-in for OpenVINO reads, and faults to choose from."""

import os
import shutil
from pathlib import Path

import numpy as np

from sqft.storage.integers import PackedCheckpoint


def nibbles(values):
    flat = values.reshape(-1)
    return flat[0::2] | flat[1::2] << 4


def main_export(model, output, task, ov_config, convert_tokenizer):
    assert (task, ov_config.dtype, convert_tokenizer) == ("text-generation-with-past", "fp32", False)
    fault = os.environ.get("EXPORTER_FAULT", "")
    shutil.copytree(model, output)
    packed, arrays = PackedCheckpoint(model), {}
    for index, name in enumerate(packed.shapes):
        codes, grid = packed.read(name)
        groups = grid.scale_OG.shape[1]
        parts = {
            "codes": codes.T.reshape(groups, -1, len(codes)).numpy().copy(),
            "zeros": grid.zero_OG.T.unsqueeze(1).numpy().copy(),
            "scales": grid.scale_OG.float().T.unsqueeze(1).numpy().copy(),
        }
        if index == 3 and fault in parts:
            parts[fault].flat[5] = 0 if parts[fault].flat[5] else 1
        if index == 3 and fault == "drops":
            continue
        for part, values in parts.items():
            arrays[f"{name}:{part}"] = values if part == "scales" else nibbles(values)
            arrays[f"{name}:{part}:shape"] = np.array(values.shape)
    for name in set(packed.checkpoint.entries) - set(packed.stored_names()):
        arrays[f"{name}:float"] = packed.checkpoint.read(name).float().numpy()
    np.savez(Path(output, "openvino_model.npz"), **arrays)
    Path(output, "openvino_model.xml").write_text("<net/>")
