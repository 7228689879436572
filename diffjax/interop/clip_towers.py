"""A whole CLIP: pictures and captions to vectors whose cosine says how well they go together."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from diffjax.errors import UserError
from diffjax.evaluation.features import Extractor
from diffjax.interop import clip, vision
from diffjax.interop.features import open_extractor
from diffjax.interop.model import open_network
from diffjax.interop.text import read_tokenizer
from diffjax.text.pretrained import PretrainedText, Tokenizer, clip_text
from diffjax.untrusted import check_links, read_bytes

_TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_MAX_BYTES = 32 * 2**20
_OF_PATCH = {32: "clip_b32", 14: "clip_l14"}


@dataclasses.dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP.

    Attributes:
      distance: what the squared MMD of its embeddings of pictures is called: "CMMD" of ViT-L/14 at 336 px
        alone, else "MMD-CLIP-…".
      digest: of its files.
      see: the tower for pictures.
      text: the tower for captions, whose pooled vectors are meant.
    """

    distance: str
    digest: str
    see: Extractor
    text: PretrainedText
    _known: dict[str, np.ndarray] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def read(self, captions: Sequence[str]) -> np.ndarray:
        """Embeddings of captions, at least one: `[n, width]`; each is computed once, what is too long cut."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        if new:
            vectors = self.text.encode(new, length=self.text.length).pooled
            self._known.update(zip(new, vectors, strict=True))
        return np.stack([self._known[caption] for caption in captions])


def open_clip(folder: Path, mesh: Mesh | None = None) -> Clip:
    """Open a CLIPModel of transformers, such as openai/clip-vit-large-patch14-336, with its tokenizer.

    Args:
      folder: holds config.json, safetensors and the tokenizer's files.
      mesh: see `Extractor`.

    Raises:
      UserError: something is missing or not what it should be.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: holds no CLIP; expected config.json, model.safetensors and the tokenizer's files of, "
            "for one, openai/clip-vit-large-patch14-336 of transformers."
        )
    network = open_network(folder, {"CLIPModel": clip.FAMILIES["CLIPModel"]})
    pictures: Any = open_network(folder, {"CLIPModel": vision.FAMILIES["CLIPModel"]}).module
    module: Any = network.module
    if pictures.patch not in _OF_PATCH:
        raise UserError(
            f"{folder}: has patches of {pictures.patch}; expected a CLIP with patches of 14 or 32."
        )
    see = open_extractor(_OF_PATCH[pictures.patch], str(folder), mesh)
    name = see.name if pictures.side == 224 else f"{see.name}@{pictures.side}"
    standard = name == "CLIP-L/14@336" and (pictures.embed, pictures.layers) == (1024, 24)
    files = [folder / "config.json", *network.store.files()]
    text = clip_text(module, network.read(), _tokenizer(folder, module.vocab), files)
    return Clip(
        distance="CMMD" if standard else f"MMD-{name}",
        digest=text.fingerprint,
        see=dataclasses.replace(see, name=name, distance=f"FD-{name}"),
        text=text,
    )


def _tokenizer(folder: Path, vocab: int) -> Tokenizer:
    """The tokenizer out of a folder whose other files are larger than any of a tokenizer."""
    there = [folder / name for name in _TOKENIZER if (folder / name).is_file()]
    check_links(folder, there)
    with tempfile.TemporaryDirectory() as copy:
        for path in there:
            (Path(copy) / path.name).write_bytes(read_bytes(path, _MAX_BYTES))
        try:
            return Tokenizer(read_tokenizer(Path(copy)), vocab)
        except UserError as error:
            raise UserError(str(error).replace(copy, str(folder))) from error
