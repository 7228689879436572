"""Pictures, captions and what a network is told, from a configuration."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.data.array_records import load_array_record
from diffjax.data.decode import Limits
from diffjax.data.emoji import load_emoji
from diffjax.data.folder import load_folder
from diffjax.data.latent_cache import LatentCache, RandomView
from diffjax.data.loader import make_loader
from diffjax.data.parquet import load_parquet
from diffjax.data.rejects import Rejects
from diffjax.data.source import Source
from diffjax.data.tfds import load_tfds
from diffjax.data.transforms import random_crop, random_flip, resize
from diffjax.data.webdataset import load_webdataset
from diffjax.errors import UserError
from diffjax.experiment.stages import build_model
from diffjax.experiment.tables import DTYPES, Log, choose
from diffjax.interop.pipeline import open_pipeline
from diffjax.interop.text import load_minilm, open_text_encoder
from diffjax.nn.conditioning import Cond
from diffjax.parallel import hosts
from diffjax.parallel.rules import Rules, param_shardings
from diffjax.text.cache import TextTable, embed_captions
from diffjax.text.encoder import TextEncoder, TextStates
from diffjax.text.live import AddTokens

SOURCES: dict[str, Callable[..., Any]] = {
    "emoji": load_emoji,
    "folder": load_folder,
    "tfds": load_tfds,
    "array_record": load_array_record,
    "webdataset": load_webdataset,
    "parquet": load_parquet,
}
ENCODERS: dict[str, Callable[[], TextEncoder]] = {"minilm": load_minilm}


def build_source(data: ConfigDict, *, log: Log | None = None, split: str | None = None) -> Source:
    """Open the pictures that `data` describes, or another split of the same."""
    load = choose(SOURCES, data.source, "data.source")
    split = split or data.split
    settings = {
        "num_concepts": data.num_concepts if split == data.split and data.num_concepts else None,
        "folder": data.folder,
        "dataset": data.name,
        "data_dir": data.folder or None,
        "image": data.image or None,
        "caption": data.caption or None,
        "background": tuple(data.background),
        "animated": data.animated,
        "limits": Limits(**data.limits),
    }
    asked = {key: settings[key] for key in inspect.signature(load).parameters if key in settings}
    for key, name in (("folder", "data.folder"), ("dataset", "data.name")):
        if key in asked and not asked[key]:
            raise UserError(f"data.source={data.source!r} needs {name}: give --config.{name}=….")
    cache_dir = Path(data.cache_dir).expanduser()
    with hosts.first_alone(f"pictures of {split}"):  # it may write the cache that the others then find
        return load(cache_dir, resolution=data.resolution, split=split, log=log, **asked)


def check_classes(config: ConfigDict, source: Source) -> None:
    """Refuse data whose classes the network of a stage cannot be told.

    Raises:
      UserError: the data has no classes, or more than the network.
    """
    if "label" not in config.conditions:
        return
    if not len(source.labels):
        raise UserError(f"conditions={config.conditions} asks for classes, but {source.name} has none.")
    known = getattr(build_model(config), "classes", 0)
    if len(source.classes) > known:
        raise UserError(
            f"model.classes={known}, but {source.name} has {len(source.classes)} classes; the network "
            "needs as many at least."
        )


def build_encoder(config: ConfigDict, mesh: Mesh | None = None) -> TextEncoder | None:
    """Load the frozen text encoder of a stage; None if it is not conditioned on text.

    Args:
      config: the stage's configuration.
      mesh: over which the parameters of a public encoder are divided.
    """
    if "text" not in config.conditions:
        return None
    text = config.text
    if text.encoder == "public":
        encoder: Any = _public_encoder(config, mesh)
    else:
        encoder = choose(ENCODERS, text.encoder, "text.encoder")()
    if text.length > encoder.max_length:
        raise UserError(
            f"text.length={text.length}, but {text.encoder} reads at most {encoder.max_length} tokens."
        )
    return encoder


def _public_encoder(config: ConfigDict, mesh: Mesh | None) -> Any:
    if not config.text.folder:
        raise UserError(
            "text.encoder='public' needs a folder: give --config.text.folder=FOLDER, a checkpoint of "
            "diffusers with its text encoders."
        )
    folder = Path(config.text.folder).expanduser()
    kind = open_pipeline(folder).kind.name

    def place(shapes: Any, axes: Any) -> Any:
        return None if mesh is None else param_shardings(mesh, Rules(), shapes, axes)

    names = {"sd": "sd15", "if_super_resolution": "if"}
    dtype = choose(DTYPES, config.dtype, "dtype")
    return open_text_encoder(folder, names.get(kind, kind), dtype=dtype, place=place if mesh else None)


def with_text_length(config: ConfigDict, encoder: TextEncoder | None) -> ConfigDict:
    """The configuration with the number of tokens that a public encoder's pipeline uses, where it is 0."""
    if encoder is None or config.text.length:
        return config
    config = config.copy_and_resolve_references()
    config.text.length = getattr(encoder, "length", encoder.max_length)
    return config


def build_text_table(
    config: ConfigDict, encoder: TextEncoder | None, captions: Sequence[str], *, log: Log | None = None
) -> TextTable | None:
    """Encode captions, or find them in the cache; with the empty one, where it stands for no text."""
    if encoder is None:
        return None
    if config.text.null != "learned":
        captions = [*captions, ""]
    cache_dir = Path(config.data.cache_dir).expanduser() / "text"
    # Encoders may lie on the devices of all processes, who then must encode the same captions together.
    return embed_captions(
        encoder,
        captions,
        length=config.text.length,
        cache_dir=cache_dir,
        log=log,
        write=hosts.is_first(),
        agree=hosts.anywhere,
    )


def text_widths(text: TextTable | None) -> dict[str, int]:
    """The widths of encoded captions, as `build_stage` asks for them."""
    return {} if text is None else {"text_embed": text.embed, "pooled_embed": text.pooled_embed}


@dataclasses.dataclass(frozen=True)
class AddText:
    """A transform that adds a picture's encoded caption; with chance `drop`, the empty one's or zeros.

    It has the method of grain's `RandomMap`: which captions are dropped depends on the seed and the element's
    place in the order alone.
    """

    captions: Sequence[str]
    table: TextTable
    drop: float = 0.0
    zeros: bool = False

    def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Add `text`, `mask` and `pooled` to an element with its `index`."""
        dropped = self.drop > 0.0 and rng.random() < self.drop
        text = self.table.lookup("" if dropped else self.captions[int(element["index"])])
        if dropped and self.zeros:
            text = text._replace(states=np.zeros_like(text.states), pooled=np.zeros_like(text.pooled))
        return {**element, "text": text.states, "mask": text.mask, "pooled": text.pooled}


def build_loader(
    config: ConfigDict,
    source: Source,
    table: TextTable | None,
    latents: LatentCache | None = None,
    *,
    live: TextEncoder | None = None,
    rows: Sequence[int] | None = None,
    rejects: Rejects | None = None,
) -> Any:
    """An iterator of batches, or of some `rows` of each: `image`, `index`, and the stage's conditions.

    With the cached `latents` of the source, there are `moments` `[batch, 2, h, w, c]` in place of `image`;
    all else is the same, the order and which captions are dropped included. Where a `live` encoder is to
    encode captions, not the `table`, there are their tokens, which `diffjax.text.live.add_states` replaces.
    Examples that turn out to be bad are noted in `rejects`, and others take their places.
    """
    transforms: list[Any] = [resize(source.resolution, config.resolution) if latents is None else latents.add]
    if config.crop:
        transforms.append(random_crop(config.crop))
    if config.data.flip:
        transforms.append(random_flip() if latents is None else RandomView())
    drop = 0.0 if config.text.null == "learned" else config.text.drop
    zeros = config.text.null == "zeros"
    if live is not None:
        transforms.append(AddTokens(source.captions, live, config.text.length, drop, zeros=zeros))
    elif table is not None:
        transforms.append(AddText(source.captions, table, drop, zeros=zeros))
    if "label" in config.conditions:
        transforms.append(
            lambda element: {**element, "label": np.int32(source.labels[int(element["index"])])}
        )
    return make_loader(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        rows=rows,
        transforms=transforms,
        images=latents is None,
        rejects=rejects,
        num_threads=config.data.num_threads,
    )


def null_zeros(cond: Cond) -> Cond:
    """The null condition of networks that were trained with zeros in the place of no text (SDXL)."""
    return cond._replace(text=np.zeros_like(cond.text), pooled=np.zeros_like(cond.pooled))


def to_cond(
    text: TextTable | TextStates | None, captions: Sequence[str] = (), labels: Sequence[int] = ()
) -> Cond:
    """The conditions of examples.

    Args:
      text: their encoded captions, or a table in which `captions` are found; None: they have none.
      captions: as many as there are examples.
      labels: their classes; none if the stage knows no classes.
    """
    cond = Cond(label=np.asarray(labels, np.int32) if len(labels) else None)
    if text is None:
        return cond
    rows = text.rows(captions) if isinstance(text, TextTable) else text
    return cond._replace(text=np.asarray(rows.states, np.float32), mask=rows.mask, pooled=rows.pooled)
