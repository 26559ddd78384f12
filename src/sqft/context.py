"""What all stages of a run share: seed, device, the model's tokenizer, the data, and whether foreign code may run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sqft.data.calibration import calibration_tokens
from sqft.data.load import Data
from sqft.device import DeviceName, resolve
from sqft.model.opening import load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from sqft.recipe import CalibrationConfig, DataConfig


@dataclass
class Context:
    """Made once by a run or a command and handed to its stages.

    All models of a run have one tokenizer: compressing and merging copy its files. So it is loaded once, and so are the
    rows, whose chats it renders.

    Attributes:
        seed: of everything that is drawn.
        trust_remote_code: whether code that the model's repository brings may run.
        device_name: where to compute: auto, cpu or cuda.
    """

    seed: int = 0
    trust_remote_code: bool = False
    device_name: DeviceName = "auto"
    _tokenizer: PreTrainedTokenizerBase | None = None
    _data: Data | None = None

    @property
    def device(self) -> torch.device:
        """Where the stages compute.

        Raises:
            InputError: `cuda` was asked for, and there is none.
        """
        return resolve(self.device_name)

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """Return the tokenizer, loaded from `folder` on the first call.

        Raises:
            InputError: the folder has none that loads.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(folder, trust_remote_code=self.trust_remote_code)
        return self._tokenizer

    def data(self, folder: Path) -> Data:
        """Return the data, each file of which is read once; chats are rendered by the tokenizer of `folder`."""
        if self._data is None:
            self._data = Data(self.tokenizer(folder))
        return self._data

    def calibration(self, folder: Path, config: CalibrationConfig, data: DataConfig | None) -> torch.Tensor:
        """Return calibration tokens for a model, int64 [samples, length]; see :func:`calibration_tokens`."""
        return calibration_tokens(config, data, self.tokenizer(folder), self.seed, self.data(folder))

    def seeded(self, seed: int) -> Context:
        """Return this context with another seed."""
        return replace(self, seed=seed)
