"""A public checkpoint as a whole: which networks it has, where they lie, and how it is sampled."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffjax.errors import UserError
from diffjax.interop.families import number
from diffjax.interop.process import FILE as SCHEDULER_FILE
from diffjax.interop.process import Process, read_process, write_process
from diffjax.interop.samplers import Sampler
from diffjax.untrusted import check_links, read_json

FILE = "model_index.json"
_DENOISERS = ("transformer", "unet")
_TEXTS = ("", "_2", "_3")
_PARTS = (
    *_DENOISERS,
    *("vae", "scheduler", "image_noising_scheduler"),
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in _TEXTS),
)


class Kind(NamedTuple):
    """What the pipelines of a class have in common; the numbers are the defaults of diffusers.

    Attributes:
      name: ours.
      guidance_scale: 1 is off.
      num_steps: of its sampler.
      text_length: the number of tokens that its longest text encoder is given; 0 without text.
      latent: whether its images are latents of an autoencoder.
      sample_size: the side of its images or latents where the network does not say.
    """

    name: str
    guidance_scale: float
    num_steps: int
    text_length: int = 77
    latent: bool = True
    sample_size: int = 64


KINDS = {
    "DiTPipeline": Kind("dit", 4.0, 50, 0, sample_size=32),
    "PixArtAlphaPipeline": Kind("pixart", 4.5, 20, 120, sample_size=128),
    "PixArtSigmaPipeline": Kind("pixart", 4.5, 20, 300, sample_size=128),
    "StableDiffusionPipeline": Kind("sd", 7.5, 50),
    "StableDiffusionXLPipeline": Kind("sdxl", 5.0, 50, sample_size=128),
    "StableDiffusion3Pipeline": Kind("sd3", 7.0, 28, 256, sample_size=128),
    "FluxPipeline": Kind("flux", 3.5, 28, 512, sample_size=128),
    "IFPipeline": Kind("if", 7.0, 100, latent=False),
    "IFSuperResolutionPipeline": Kind("if_super_resolution", 4.0, 50, latent=False, sample_size=256),
}


class Pipeline(NamedTuple):
    """A checkpoint that has been looked at.

    Attributes:
      folder: where it lies.
      kind: what it is.
      components: the folders of its parts, by their names in diffusers.
      denoiser: which of them is the network, "transformer" or "unet".
      process: what it was trained with, and its default sampler; None if the folder is a network alone.
      image_noise: the process that noises low-resolution images, of a super-resolution stage.
      labels: names of the classes, by number.
      channels: of the images or latents that the process is of.
      scale: pixels a latent's side; 1 without an autoencoder.
      resolution: the side of the images that it is meant for, in pixels.
      patch: the side of a token, in latents; 0 where the network has none.
      learned_variance: whether the network's output has twice the channels.
      guidance_embedded: whether the network is told the guidance scale, which then is not applied.
      zero_null_text: whether the states of the empty text are zeros.
    """

    folder: Path
    kind: Kind
    components: Mapping[str, Path]
    denoiser: str
    process: Process | None
    image_noise: Process | None
    labels: tuple[str, ...]
    channels: int
    scale: int
    resolution: int
    patch: int
    learned_variance: bool
    guidance_embedded: bool
    zero_null_text: bool

    def component(self, name: str) -> Path:
        """The folder of a part.

        Raises:
          UserError: it is not there.
        """
        if name not in self.components:
            have = ", ".join(sorted(self.components))
            raise UserError(f"{self.folder}: has no {name}, only {have}; get that folder too.")
        return self.components[name]

    def text_encoders(self) -> dict[str, tuple[Path, Path]]:
        """The folders of each text encoder and its tokenizer, by the encoder's name."""
        names = [f"text_encoder{i}" for i in _TEXTS if f"text_encoder{i}" in self.components]
        return {
            name: (self.components[name], self.component(name.replace("text_encoder", "tokenizer")))
            for name in names
        }

    def sampler(self, num_steps: int = 0, *, resolution: int = 0) -> Sampler:
        """How it is sampled in the original; 0 is its own number of steps or resolution."""
        if self.process is None:
            raise UserError(f"{self.folder}: has no scheduler, so how it is sampled is for you to say.")
        side = (resolution or self.resolution) // self.scale
        tokens = (side // self.patch) ** 2 if self.patch else 0
        even = self.kind.name == "flux"
        return self.process.sampler(num_steps or self.kind.num_steps, tokens=tokens, even=even)


def open_pipeline(folder: Path) -> Pipeline:
    """Look at a checkpoint of diffusers: a pipeline, some folders of one, or its network alone.

    Raises:
      UserError: it is none, of a class that is not known, or a part of it lies elsewhere.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; expected a checkpoint of diffusers.")
    index = read_json(folder / FILE) if (folder / FILE).is_file() else {}
    components = _components(folder, index)
    denoiser = next((name for name in _DENOISERS if name in components), None)
    if denoiser is None:
        raise UserError(
            f"{folder}: has neither {FILE} nor config.json, transformer or unet; expected a checkpoint of "
            "diffusers. If it is there, part of it was not downloaded."
        )
    network = read_json(components[denoiser] / "config.json")
    name = str(index["_class_name"]) if "_class_name" in index else _guess(network)
    if name not in KINDS:
        raise UserError(f"{folder}: is of a {name!r:.80}; supported are {', '.join(KINDS)}.")
    if index and "scheduler" not in components:
        raise UserError(f"{folder}: has no scheduler; get that folder too.")
    kind = KINDS[name]
    if kind.name == "flux" and not network.get("guidance_embeds"):
        kind = kind._replace(guidance_scale=1.0, num_steps=4, text_length=256)  # distilled to few steps
    channels, scale = _channels(folder, kind, network, components)
    size = number(network, "sample_size", kind.sample_size) if kind.name != "flux" else kind.sample_size
    noise = components.get("image_noising_scheduler")
    return Pipeline(
        folder=folder,
        kind=kind,
        components=components,
        denoiser=denoiser,
        process=read_process(components["scheduler"]) if "scheduler" in components else None,
        image_noise=read_process(noise) if noise else None,
        labels=_labels(index),
        channels=channels,
        scale=scale,
        resolution=size * scale,
        # FLUX's latents are folded before the network sees them.
        patch=2
        if kind.name == "flux"
        else number(network, "patch_size", 2)
        if denoiser == "transformer"
        else 0,
        learned_variance=network.get("out_channels") == 2 * channels,
        guidance_embedded=bool(network.get("guidance_embeds")),
        zero_null_text=kind.name == "sdxl" and index.get("force_zeros_for_empty_prompt") is not False,
    )


def write_pipeline_index(
    folder: Path, class_name: str, *, scheduler: Mapping[str, Any] | None = None, labels: Sequence[str] = ()
) -> None:
    """Write model_index.json for the parts that lie in a folder, so that diffusers opens it.

    Args:
      folder: the folder; its networks are in place, see `diffjax.interop.model.write_network`.
      class_name: of the pipeline, such as "DiTPipeline".
      scheduler: what `diffjax.interop.process.scheduler_config` returned, to be written too. DiTPipeline
        leaves a learned variance aside, so for it that must not be asked for.
      labels: names of the classes, by number.
    """
    if class_name not in KINDS:
        raise UserError(f"there is no {class_name!r:.80}; expected one of {', '.join(KINDS)}.")
    if scheduler is not None:
        write_process(folder / "scheduler", scheduler)
    index: dict[str, Any] = {"_class_name": class_name}
    if labels:
        index["id2label"] = {str(i): label for i, label in enumerate(labels)}
    for name in _PARTS:
        part = folder / name
        if part.is_dir():
            file = SCHEDULER_FILE if "scheduler" in name else "config.json"
            config = read_json(part / ("tokenizer_config.json" if "tokenizer" in name else file))
            library = "transformers" if "tokenizer" in name or "text" in name else "diffusers"
            named = config.get("_class_name") or config.get("tokenizer_class") or config.get("architectures")
            index[name] = [library, named[0] if isinstance(named, list) else named]
    (folder / FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _components(folder: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    """The folders of the parts that are of use here and are there."""
    for name, value in index.items():
        plain = name not in (".", "..") and not set(name) & set("/\\:\0")
        if isinstance(value, list) and not plain:
            raise UserError(
                f"{folder / FILE}: names the part {name!r:.80}; expected the name of a folder in it."
            )
    names = [name for name in _PARTS if not index or _is_present(index.get(name))]
    found = {name: folder / name for name in names if (folder / name).is_dir()}
    if not index and not set(_DENOISERS) & found.keys() and (folder / "config.json").is_file():
        denoiser = (
            "unet" if "UNet" in str(read_json(folder / "config.json").get("_class_name")) else "transformer"
        )
        found = {denoiser: folder}
        if (folder / SCHEDULER_FILE).is_file():
            found["scheduler"] = folder
    check_links(folder, [path for part in found.values() for path in (part, *part.iterdir())])
    return found


def _is_present(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _guess(network: Mapping[str, Any]) -> str:
    """The class of the pipeline that a network is usually part of."""
    name = str(network.get("_class_name"))
    if name == "Transformer2DModel":  # before each had a class of its own
        name = "PixArt" if network.get("norm_type") == "ada_norm_single" else "DiT"
    if name == "UNet2DConditionModel":
        channels = network.get("in_channels")
        if channels in (3, 6):
            return "IFPipeline" if channels == 3 else "IFSuperResolutionPipeline"
        if network.get("addition_embed_type") == "text_time":
            return "StableDiffusionXLPipeline"
        return "StableDiffusionPipeline"
    stems = {"DiT": "DiT", "PixArt": "PixArtAlpha", "SD3": "StableDiffusion3", "Flux": "Flux"}
    return next((f"{stem}Pipeline" for start, stem in stems.items() if name.startswith(start)), name)


def _channels(
    folder: Path, kind: Kind, network: Mapping[str, Any], components: Mapping[str, Path]
) -> tuple[int, int]:
    """The channels of what the process is of, and the pixels to a side of its pixels."""
    channels = number(network, "in_channels", 64 if kind.name == "flux" else 4)
    if kind.name == "flux":
        channels //= 4
    elif kind.name == "if_super_resolution":
        channels //= 2
    if not kind.latent:
        return channels, 1
    if "vae" not in components:
        return channels, 8
    vae = read_json(components["vae"] / "config.json")
    latents, blocks = number(vae, "latent_channels", 4), vae.get("block_out_channels")
    if latents != channels:
        raise UserError(
            f"{folder}: its network reads {channels} channels, of which {latents} are latents; networks with "
            "further inputs, such as for inpainting, are not supported."
        )
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8:
        raise UserError(
            f"{components['vae']}: block_out_channels is {blocks!r:.80}; expected a list of sizes."
        )
    return channels, 2 ** (len(blocks) - 1)


def _labels(index: Mapping[str, Any]) -> tuple[str, ...]:
    labels = index.get("id2label") or {}
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(len(labels))}:
        raise UserError(f"{FILE}: id2label is not a name for each number from 0 on.")
    return tuple(str(labels[str(i)]) for i in range(len(labels)))
