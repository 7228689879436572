"""What a family of public networks is: a class of another library, and the module that it is here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from diffjax.errors import UserError
from diffjax.interop.rows import Row
from diffjax.interop.store import Store

_MOST = 2**24  # no size of a real network comes near


class Family(NamedTuple):
    """A class of an original library, and how it corresponds to a module of ours.

    Attributes:
      name: its name there: `_class_name` of a config.json of diffusers, `architectures` of transformers.
      library: "diffusers" or "transformers".
      build: its config.json, and the tensors where the file does not say all, to our module in float32;
        UserError names what is not supported.
      config: our module to what its config.json must say, `_class_name` or `architectures` apart.
      rows: our module to the table of its layers.
      example: our module to arguments of its `__call__` of any sizes, for the shapes of the parameters.
      ignored: how names begin that may be there though nothing needs them.
      aliases: what parts of names were called in old checkpoints, by what they are called now.
    """

    name: str
    library: str
    build: Callable[[Mapping[str, Any], Store], nn.Module]
    config: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], Sequence[Row]]
    example: Callable[[Any], tuple[Any, ...]]
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size of a config.json: a whole number from 1 to 2^24; `default` where the key is absent or null.

    Raises:
      UserError: it is something else, or absent without a default.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise UserError(f"config.json: {key} is {value!r:.80}; expected a whole number from 1 to {_MOST}.")
    return value


def fraction(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a config.json between 0 and 1, both excluded, such as the epsilon of a norm.

    Raises:
      UserError: it is something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(f"config.json: {key} is {value!r:.80}; expected a number between 0 and 1.")
    return float(value)


def require(config: Mapping[str, Any], **expected: Any) -> None:
    """Refuse a config.json that says what is not implemented.

    Args:
      config: the file.
      **expected: by key, the value that is, or a tuple of such values; an absent key or null is well.
    """
    for key, values in expected.items():
        values = values if isinstance(values, tuple) else (values,)
        given = config.get(key)
        if given is not None and given not in values:
            raise UserError(
                f"config.json: {key} is {given!r:.80}, which is not supported; "
                f"expected {' or '.join(map(repr, values))}."
            )


def get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A setting of a config.json; `default` where the key is absent or null."""
    value = config.get(key)
    return default if value is None else value


def optional(config: Mapping[str, Any], key: str) -> int:
    """As `number`, or 0 where the key is absent or null."""
    return 0 if config.get(key) is None else number(config, key)


def real(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a config.json that is not negative; `default` where the key is absent or null."""
    value = get(config, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1e6:
        raise UserError(f"config.json: {key} is {value!r:.80}; expected a number.")
    return float(value)


def choice(config: Mapping[str, Any], key: str, table: Mapping[Any, Any], default: Any) -> Any:
    """What `table` has for a setting; `default` is the setting where the key is absent; null is one, too."""
    value = config.get(key, default)
    if not isinstance(value, str | None) or value not in table:
        raise UserError(f"config.json: {key} is {value!r:.80}; supported are {', '.join(map(str, table))}.")
    return table[value]


def listed(config: Mapping[str, Any], key: str, count: int, default: Any) -> list[Any]:
    """A setting that is said once for all of `count` levels, or for each."""
    value = get(config, key, default)
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise UserError(f"config.json: {key} is {value!r:.80}; expected one entry or {count}.")
    return values


def numbers(config: Mapping[str, Any], key: str, count: int, default: Any) -> tuple[int, ...]:
    """Sizes, as `number` has them, that are said once for all of `count` levels, or for each."""
    return tuple(number({key: value}, key) for value in listed(config, key, count, default))
