"""Every setting of a run, validated: YAML in, frozen pydantic models out.

One recipe holds the three independent choices that span the paper's methods (base precision, adapter `kind`, `ranks`)
and the data. Unknown keys are refused and the nearest right key is named; all problems of a file are listed at once.
`None` means off. Units stand in each field's description, which is also what the JSON schema and `--help` show.
"""

from sqft.recipe.base import MAX_SEED, Config, PositiveInt, parse_config, parse_pattern
from sqft.recipe.file import load_recipe, read_yaml
from sqft.recipe.finetune import DistillConfig, FinetuneConfig, Kind
from sqft.recipe.settings import (
    CalibrationConfig,
    DataConfig,
    EvaluateConfig,
    MergeConfig,
    QuantizeConfig,
    SearchConfig,
    SparsifyConfig,
    Template,
    VerifyConfig,
)
from sqft.recipe.teacher import TeacherConfig
from sqft.recipe.whole import Recipe

__all__ = [
    "MAX_SEED",
    "CalibrationConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "Kind",
    "MergeConfig",
    "PositiveInt",
    "QuantizeConfig",
    "Recipe",
    "SearchConfig",
    "SparsifyConfig",
    "TeacherConfig",
    "Template",
    "VerifyConfig",
    "load_recipe",
    "parse_config",
    "parse_pattern",
    "read_yaml",
]
