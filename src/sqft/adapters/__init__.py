"""What hangs on a linear: configuration, layers, elastic ranks, saving and attaching, W' from folders.

Importing the room makes PEFT load masked adapters. PEFT's own ways are used for all of it, private ones where there are
no others: `LoraConfig._custom_modules` and the constructor of its layers, `PEFT_TYPE_TO_CONFIG_MAPPING`, and the
variants that a configuration asks for; nothing of PEFT is replaced.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from sqft.adapters.config import LAYER_OF_KIND, PEFT_TYPE, SqftConfig
from sqft.adapters.layers import SqftLinear
from sqft.adapters.masked import SqftMaskedLinear
from sqft.adapters.quantized import SqftQuantizedLinear

LAYER_OF_KIND.update({layer.kind: layer for layer in (SqftLinear, SqftMaskedLinear, SqftQuantizedLinear)})
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # type: ignore[index]
