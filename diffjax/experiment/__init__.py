"""From a configuration to objects: the only place that turns names into functions."""

from diffjax.experiment.examples import find_bad, open_rejects, usable_examples
from diffjax.experiment.inputs import (
    AddText,
    build_encoder,
    build_loader,
    build_source,
    build_text_table,
    check_classes,
    null_zeros,
    text_widths,
    to_cond,
    with_text_length,
)
from diffjax.experiment.stages import (
    MODELS,
    SIZES,
    StageModel,
    build_ema,
    build_model,
    build_optimizer,
    build_sampler,
    build_stage,
    build_update,
    check_sampler,
    example_inputs,
)
from diffjax.experiment.tables import build, choose, without_foreign

__all__ = [
    "MODELS",
    "SIZES",
    "AddText",
    "StageModel",
    "build",
    "build_ema",
    "build_encoder",
    "build_loader",
    "build_model",
    "build_optimizer",
    "build_sampler",
    "build_source",
    "build_stage",
    "build_text_table",
    "build_update",
    "check_classes",
    "check_sampler",
    "choose",
    "example_inputs",
    "find_bad",
    "null_zeros",
    "open_rejects",
    "text_widths",
    "to_cond",
    "usable_examples",
    "with_text_length",
    "without_foreign",
]
