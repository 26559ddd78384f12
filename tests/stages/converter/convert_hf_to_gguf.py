"""The stand-in's command line."""

import json
import sys
from pathlib import Path

from conversion import TextModel


def main():
    _, folder, _, outtype, _, out = sys.argv
    config = json.loads((Path(folder) / "config.json").read_text())
    assert "quantization_config" not in config
    assert outtype == "bf16"
    TextModel(Path(folder), Path(out)).write()
