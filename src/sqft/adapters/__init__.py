"""LoRA layers on masked and quantised linears: configuration, elastic ranks, saving, loading and merging.

Importing this package registers the peft_type SQFT with PEFT. Its private interfaces are used where it has no public
ones: `LoraConfig._custom_modules`, the constructor of its layers, `PEFT_TYPE_TO_CONFIG_MAPPING`, and the LoRA variants
that a configuration declares. Nothing of PEFT is replaced.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from sqft.adapters.config import LAYER_OF_KIND, PEFT_TYPE, SqftConfig
from sqft.adapters.layers import SqftLinear
from sqft.adapters.masked import SqftMaskedLinear
from sqft.adapters.quantized import SqftQuantizedLinear

LAYER_OF_KIND.update({layer.kind: layer for layer in (SqftLinear, SqftMaskedLinear, SqftQuantizedLinear)})
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SqftConfig  # type: ignore[index]
