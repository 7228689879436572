"""One network of a public checkpoint: its folder to a module and parameters, and back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from diffjax.errors import UserError
from diffjax.interop.families import Family
from diffjax.interop.rows import check, read_params, sources, to_tensors
from diffjax.interop.store import Store, write_store
from diffjax.nn.placement import logical_axes, unbox
from diffjax.untrusted import read_json

_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}


class Network(NamedTuple):
    """A network of a folder that has been looked at, but whose tensors have not been read.

    Attributes:
      folder: where it lies.
      family: which one it is.
      module: the module, in float32.
      shapes: the shapes of its parameters, `jax.ShapeDtypeStruct`.
      axes: their logical axis names.
      store: its tensors.
    """

    folder: Path
    family: Family
    module: nn.Module
    shapes: Any
    axes: Any
    store: Store

    def read(self, *, shardings: Any = None, dtype: Any = np.float32) -> Any:
        """The parameters, in `dtype`, each placed as the tree `shardings` says (None: the default device)."""
        table = sources(self.family.rows(self.module), self.shapes)
        check(self.store, table, lambda name: name.startswith(self.family.ignored))
        return read_params(self.store, table, shardings=shardings, dtype=dtype)


def open_network(folder: Path, families: Mapping[str, Family]) -> Network:
    """Look at a folder with config.json and safetensors.

    Raises:
      UserError: it is no such folder, or of no family that is known.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; expected a folder of diffusers or transformers.")
    config = read_json(path)
    architectures = config.get("architectures")
    of_transformers = architectures[0] if isinstance(architectures, list) and architectures else None
    name = str(config.get("_class_name") or of_transformers)
    if name not in families:
        raise UserError(f"{path}: is of a {name!r:.80}; supported are {', '.join(families)}.")
    family = families[name]
    store = Store(folder, family.aliases)
    try:
        module = family.build(config, store)
        boxed = abstract_params(family, module)
    except UserError as error:
        store.close()
        raise UserError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        store.close()
        raise UserError(f"{path}: its sizes make no network ({type(error).__name__}: {error}).") from error
    return Network(folder, family, module, unbox(boxed), logical_axes(boxed), store)


def write_network(
    folder: Path, family: Family, module: Any, params: Any, *, max_bytes: int = 5 * 10**9
) -> None:
    """Write a network as the original library writes it, so that it reads it again.

    Args:
      folder: where to.
      family: of the module.
      module: the module.
      params: its parameters; they are written in their own dtype.
      max_bytes: of one file.
    """
    table = sources(family.rows(module), unbox(abstract_params(family, module)))
    tensors, stem = to_tensors(params, table), _STEMS[family.library]
    kind = {"_class_name": family.name} if family.library == "diffusers" else {"architectures": [family.name]}
    config = {**kind, **family.config(module)}
    write_store(folder, tensors, stem=stem, max_bytes=max_bytes, config=config)


def abstract_params(family: Family, module: Any) -> Any:
    """The shapes of a module's parameters, with their axis names; nothing is computed."""
    initialise: Callable[..., Any] = module.init
    return jax.eval_shape(initialise, jax.random.key(0), *family.example(module))["params"]
