"""A stand-in for OpenVINO: the graph of s * (q - z) over what the stand-in for optimum-intel wrote."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np


class Node:
    def __init__(self, kind, name, *sources, data=None, element="f32", shape=()):
        self.kind, self.name, self.sources, self.targets = kind, name, sources, []
        self.data, self.element, self.shape = data, element, shape
        for source in sources:
            source.targets.append(self)

    def get_type_name(self):
        return self.kind

    def get_friendly_name(self):
        return self.name

    def get_element_type(self):
        return SimpleNamespace(get_type_name=lambda: self.element)

    def get_attributes(self):
        return {"transpose_b": False}

    def output(self, _index):
        return SimpleNamespace(
            get_target_inputs=lambda: [SimpleNamespace(get_node=lambda t=t: t) for t in self.targets]
        )

    def inputs(self):
        return [
            SimpleNamespace(get_source_output=lambda s=s: SimpleNamespace(get_node=lambda: s)) for s in self.sources
        ]


class Core:
    def read_model(self, file):
        arrays = np.load(Path(file).with_suffix(".npz"))
        constants = {}
        for key in arrays:
            if key.endswith(":shape"):
                continue
            name, part = key.split(":")
            stem = name.removesuffix(".weight")
            named = {"codes": f"self.{stem}.weight_packed", "zeros": f"self.{stem}.weight_zero_point"}.get(part, key)
            shape = arrays[f"{key}:shape"] if f"{key}:shape" in arrays else arrays[key].shape
            element = "u4" if part in ("codes", "zeros") else "f32"
            constants[key] = Node("Constant", named, data=arrays[key], element=element, shape=tuple(shape))
        for key, codes in list(constants.items()):
            if key.endswith(":codes"):
                zeros, scales = (constants[key.replace(":codes", f":{part}")] for part in ("zeros", "scales"))
                centred = Node("Subtract", "", Node("Convert", "q", codes), Node("Convert", "z", zeros))
                Node("MatMul", "", Node("Reshape", "", Node("Multiply", "", centred, scales)))
        return SimpleNamespace(get_ops=lambda: list(constants.values()))
