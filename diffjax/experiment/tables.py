"""Names in a configuration to entries of tables, and their settings to arguments."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax.config import nearest
from diffjax.errors import UserError, brief

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

Log = Callable[[str], None]


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """The entry that a configuration names.

    Raises:
      UserError: there is no such entry; the nearest are named.
    """
    if name not in table:
        raise UserError(f"{key}={name!r} does not exist; {nearest(name, table)}")
    return table[name]


def build(table: Mapping[str, Callable[..., Any]], config: ConfigDict, key: str, **fixed: Any) -> Any:
    """Call the function that `config.name` names with the other entries of `config` as arguments.

    Raises:
      UserError: the name or an argument does not exist, or the function refuses a value.
    """
    values = {name: value for name, value in config.items() if name != "name"}
    function = choose(table, config.name, f"{key}.name")
    valid = [
        name for name in inspect.signature(function).parameters if name not in ("name", "parent", *fixed)
    ]
    for name, value in values.items():
        if name not in valid:
            advice = nearest(name, valid) if valid else "it has no settings."
            raise UserError(f"{key}.{name} is no setting of {config.name!r}; {advice}")
        if isinstance(value, ConfigDict):
            raise UserError(f"{key}.{name} is a group of keys; expected a value.")
    try:
        return function(**values, **fixed)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{key}: {brief(error)}") from error


def without_foreign(table: Mapping[str, Callable[..., Any]], config: ConfigDict) -> ConfigDict:
    """`config` without the settings that belong to other entries of the table than the one it names.

    On the command line a name can be changed, but no setting removed: `threshold.name=static` must not
    stumble over the percentile of the dynamic one.
    """
    own = inspect.signature(table[config.name]).parameters if config.name in table else {}
    foreign = {name for function in table.values() for name in inspect.signature(function).parameters} - set(
        own
    )
    return ConfigDict({name: value for name, value in config.items() if name not in foreign})
