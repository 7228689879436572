"""Makes text/: tiny text encoders with tokenizers, and what transformers and diffusers make of captions.

All parameters are random. `text/NAME/` are models as transformers writes them, `text/tokenizer_NAME/`
tokenizers, `text/models.npz` outputs and gradients of the models, and `text/pipelines.npz` what
`encode_prompt` of pipelines gives.

Run in an environment with torch (CPU), transformers 5 and diffusers: `python tests/golden/make_text.py`.
"""

import json
import shutil
import warnings
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel

HERE = Path(__file__).parent / "text"
CAPTIONS = [
    " A Red bird's nest, in 12 trees ",
    "",
    "the café by the sea: naïve 日本 😀",
    "the red bird sings in the old tree by the sea and the old red bird sings in the tree by the sea",
]
START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 16
MERGES = ["t h", "th e</w>", "r e", "re d</w>", "b i", "bi r", "bir d</w>", "s e", "se a</w>", "i n</w>"]
PIECES = ["the", "red", "bird", "sea", "tree", "in", "a", "A", "old", "sing", "s", "by", "R", "ed"]


def clip_tokenizer(name: str, pad: str) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of all bytes and a few merges, as CLIP's vocab.json and merges.txt."""
    folder = HERE / name
    folder.mkdir()
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [merge.replace(" ", "") for merge in MERGES] + [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": POSITIONS,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return transformers.CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of a few words and all ASCII letters, as T5's tokenizer.json."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    pieces += [(f"▁{piece}", -2.0 - 0.1 * i) for i, piece in enumerate(PIECES)]
    pieces += [(chr(i), -6.0 - 0.01 * i) for i in range(33, 127)] + [("é", -7.5)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    wrapped = transformers.T5Tokenizer(
        tokenizer_object=tokenizer, extra_ids=0, additional_special_tokens=[], model_max_length=512
    )
    wrapped.save_pretrained(HERE / name)
    return wrapped


def randomise(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """The model with all parameters random, around one for the scales of norms."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + scale * torch.randn(parameter.shape))
    return model.eval()


def clip(kind: type, vocab: int, **settings: object) -> torch.nn.Module:
    """A tiny CLIP."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": 12}
    config = transformers.CLIPTextConfig(
        vocab_size=vocab, max_position_embeddings=POSITIONS, pad_token_id=0, bos_token_id=vocab - 2,
        attn_implementation="eager", **sizes, **settings,
    )  # fmt: skip
    return randomise(kind(config), 0.3)


def t5(vocab: int, **settings: object) -> torch.nn.Module:
    """A tiny T5 encoder."""
    sizes = {"d_model": 40, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_heads": 4}
    config = transformers.T5Config(
        vocab_size=vocab, relative_attention_num_buckets=8, relative_attention_max_distance=12,
        attn_implementation="eager", **sizes, **settings,
    )  # fmt: skip
    return randomise(transformers.T5EncoderModel(config), 0.3)


def gradients(model: torch.nn.Module, output: torch.Tensor, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A random cotangent, and with it the gradients of the parameters of these names."""
    cotangent = torch.randn(output.shape)
    model.zero_grad()
    (output * cotangent).sum().backward()
    parameters = dict(model.named_parameters())
    return {"cotangent": cotangent.numpy()} | {
        f"grad:{name}": parameters[name].grad.detach().numpy().copy() for name in names
    }


def run_models(encoders: dict[str, torch.nn.Module]) -> dict[str, np.ndarray]:
    """Outputs of each model on random ids with a mask."""
    out = {}
    for name, model in encoders.items():
        vocab = model.config.vocab_size
        ids = torch.randint(3, vocab - 2, (2, POSITIONS))
        mask = torch.arange(POSITIONS)[None] < torch.tensor([[POSITIONS], [9]])
        found = {"ids": ids, "mask": mask}
        if name.startswith("t5"):
            # Longer than the farthest distance that is told apart.
            output = model(ids, attention_mask=mask.long()).last_hidden_state
            found |= {"states": output, "unmasked": model(ids).last_hidden_state}
            names = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                     "encoder.block.2.layer.0.SelfAttention.k.weight")  # fmt: skip
        else:
            ids[0, 11], ids[1, 5], ids[1, 8] = vocab - 1, vocab - 1, vocab - 1
            result = model(ids, output_hidden_states=True)
            output = result.hidden_states[-2]
            pooled = result.text_embeds if "text_embeds" in result else result.pooler_output
            found |= {"penultimate": output, "last": result.last_hidden_state, "pooled": pooled}
            prefix = "text_model." if "text_embeds" in result else ""
            parts = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight",
                     "encoder.layers.0.self_attn.v_proj.bias")  # fmt: skip
            names = tuple(prefix + part for part in parts)
        found |= gradients(model, output, names) if name in ("t5", "clip_g") else {}
        out |= {f"{name}/{key}": np.asarray(torch.as_tensor(value).detach()) for key, value in found.items()}
    return out


def run_pipelines(encoders: dict, tokens: dict) -> dict[str, np.ndarray]:
    """Captions as the pipelines encode them."""
    out = {}
    nothing = {"vae": None, "scheduler": None}
    unet = {**nothing, "unet": None}
    clips = {
        "tokenizer": tokens["clip"],
        "tokenizer_2": tokens["clip_g"],
        "text_encoder_2": encoders["clip_g"],
    }
    checks = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def note(name: str, *arrays: torch.Tensor) -> None:
        for key, array in zip(("states", "pooled"), arrays, strict=False):
            out[f"{name}/{key}"] = array.detach().float().numpy()

    def encode(pipe: diffusers.DiffusionPipeline, *args: object, **settings: object) -> tuple:
        return pipe.encode_prompt(
            CAPTIONS,
            *args,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **settings,
        )

    pipe = diffusers.StableDiffusionPipeline(
        text_encoder=encoders["clip_l"], tokenizer=tokens["clip"], **unet, **checks
    )
    tokenized = tokens["clip"](CAPTIONS, padding="max_length", truncation=True, max_length=POSITIONS)
    pooled = encoders["clip_l"](torch.tensor(tokenized["input_ids"])).pooler_output
    note("sd15", encode(pipe)[0], pooled)
    if not hasattr(encoders["clip_l"], "text_model"):  # where clip_skip of diffusers expects the final norm
        type(encoders["clip_l"]).text_model = property(lambda self: self)
    note("sd15_skip", encode(pipe, clip_skip=1)[0])

    pipe = diffusers.StableDiffusionXLPipeline(text_encoder=encoders["clip_l"], **clips, **unet)
    result = encode(pipe)
    note("sdxl", result[0], result[2])
    result = encode(pipe, clip_skip=1)
    note("sdxl_skip", result[0], result[2])

    flux = diffusers.FluxPipeline(
        text_encoder=encoders["clip_l"], tokenizer=tokens["clip"], text_encoder_2=encoders["t5"],
        tokenizer_2=tokens["t5"], transformer=None, **nothing,
    )  # fmt: skip
    note("flux", *flux.encode_prompt(CAPTIONS, None, device="cpu", max_sequence_length=20)[:2])

    for name, third in (("sd3", encoders["t5"]), ("sd3_without", None)):
        sd3 = diffusers.StableDiffusion3Pipeline(
            text_encoder=encoders["clip_lp"], text_encoder_3=third,
            tokenizer_3=tokens["t5"] if third else None,
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=4, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4,
                num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=8,
                pooled_projection_dim=24, out_channels=4,
            ), **clips, **nothing,
        )  # fmt: skip
        result = encode(sd3, None, None, max_sequence_length=20)
        note(name, result[0], result[2])

    pixart = diffusers.PixArtAlphaPipeline(
        tokenizer=tokens["t5"], text_encoder=encoders["t5"], transformer=None, **nothing
    )
    states, mask, *_ = pixart.encode_prompt(CAPTIONS, False, "", device="cpu", max_sequence_length=20)
    note("pixart", states)
    out["pixart/mask"] = mask.bool().numpy()

    deepfloyd = diffusers.IFPipeline(
        tokenizer=tokens["t5"],
        text_encoder=encoders["t5"],
        unet=None,
        scheduler=None,
        watermarker=None,
        **checks,
    )
    note("if", deepfloyd.encode_prompt(CAPTIONS, False, device="cpu")[0])
    return out


def main() -> None:
    """Make all of it anew."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    tokens = {
        "clip": clip_tokenizer("tokenizer_clip", END),
        "clip_g": clip_tokenizer("tokenizer_clip_g", "!"),
        "t5": t5_tokenizer("tokenizer_t5"),
    }
    vocab = len(tokens["clip"])
    projected = transformers.CLIPTextModelWithProjection
    encoders = {
        # The old rule of the token that ends a text, which Stable Diffusion's configuration asks for.
        "clip_l": clip(transformers.CLIPTextModel, vocab, num_hidden_layers=2, eos_token_id=2),
        "clip_lp": clip(projected, vocab, num_hidden_layers=2, eos_token_id=2),
        "clip_g": clip(projected, vocab, num_hidden_layers=3, eos_token_id=vocab - 1, hidden_act="gelu"),
        "t5": t5(len(tokens["t5"]), feed_forward_proj="gated-gelu"),
        "t5_relu": t5(40, feed_forward_proj="relu"),
    }
    for name, model in encoders.items():
        model.save_pretrained(HERE / name)
    np.savez_compressed(HERE / "models.npz", **run_models(encoders))
    with torch.no_grad():
        pipelines = run_pipelines(encoders, tokens)
    np.savez_compressed(HERE / "pipelines.npz", captions=np.array(json.dumps(CAPTIONS)), **pipelines)


if __name__ == "__main__":
    main()
