import json

import pytest
from networks import GOLDEN, golden_folder

from diffjax.errors import UserError
from diffjax.interop.model import open_network
from diffjax.interop.unet2d import FAMILIES
from diffjax.models.unet2d import UNet2D
from diffjax.models.unet2d_sizes import SIZES

CASES = ["sd", "sdxl", "if_first", "if_second", "adm", "ddpm"]


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_can_be_written(name):
    conditional = bool(SIZES[name].get("text_embed"))
    family = FAMILIES["UNet2DConditionModel" if conditional else "UNet2DModel"]
    module = UNet2D(**SIZES[name])
    if name in ("ADM-128", "ADM-512"):  # heads of several widths; more sinusoids than the first level is wide
        with pytest.raises(UserError, match=r"sinusoids|heads"):
            family.config(module)
        return
    config = json.loads(json.dumps(family.config(module)))
    assert family.config(family.build(config, None)) == config
    assert {*map(len, (config["down_block_types"], config["up_block_types"]))} == {len(module.channels)}


def test_sizes_of_deepfloyd_are_those_of_its_config_json():
    """What the files of IF-I-XL and IF-II-L say."""
    both = {
        "act_fn": "gelu",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 64,
        "attention_head_dim": 64,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "only_cross_attention": False,
        "out_channels": 6,
        "resnet_time_scale_shift": "scale_shift",
    }
    types = {
        way: [f"Resnet{way}sampleBlock2D", f"SimpleCrossAttn{way}Block2D", f"SimpleCrossAttn{way}Block2D"]
        for way in ("Down", "Up")
    }
    first = {
        "in_channels": 3,
        "block_out_channels": [704, 1408, 2112, 2816],
        "cross_attention_dim": 2816,
        "layers_per_block": 3,
        "down_block_types": [*types["Down"], types["Down"][1]],
        "up_block_types": [types["Up"][1], *types["Up"][::-1]],
    }
    second = {
        "in_channels": 6,
        "block_out_channels": [160, 320, 640, 960, 1280],
        "class_embed_type": "timestep",
        "cross_attention_dim": 1280,
        "layers_per_block": [2, 2, 3, 5, 5],
        "down_block_types": [*types["Down"][:1] * 2, *types["Down"]],
        "up_block_types": [*types["Up"][::-1], *types["Up"][:1] * 2],
        "mid_block_scale_factor": 1.4142271248762552,
        "resnet_out_scale_factor": 1.4142271248762552,
        "resnet_skip_time_act": True,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 1280,
    }
    family = FAMILIES["UNet2DConditionModel"]
    for size, own in (("IF-I-XL", first), ("IF-II-L", second)):
        network = UNet2D(**SIZES[size])
        assert family.build(both | own, None).clone(depth=()) == network
        written = family.config(network)
        for key, value in (both | own).items():
            assert written[key] == value, key


def test_the_number_of_heads_is_what_diffusers_means():
    """One entry means a number of heads beside transformer layers, and else the width of a head."""
    heads = {}
    for name in CASES:
        config = json.loads((GOLDEN / f"unet2d_{name}.json").read_text())
        heads[name] = FAMILIES[config["_class_name"]].build(config, None).heads
    assert heads["sd"] == (4, 4)
    assert heads["sdxl"] == (2, 4)
    assert heads["if_first"] == (1, 2)
    assert heads["ddpm"] == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("sd", {"dual_cross_attention": True}, "dual_cross_attention is True"),
        ("sd", {"conv_in_kernel": 1}, "conv_in_kernel is 1"),
        ("sd", {"time_embedding_type": "fourier"}, "time_embedding_type is 'fourier'"),
        ("sd", {"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "block type is 'KDownBlock2D'"),
        ("sd", {"down_block_types": ["DownBlock2D"]}, "each of the same 1 to 16 levels"),
        ("sd", {"block_out_channels": [8, -12]}, "block_out_channels is -12"),
        ("sd", {"block_out_channels": None}, "block_out_channels"),
        ("sd", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
        ("sd", {"layers_per_block": [1, 2, 3]}, "expected one entry or 2"),
        ("sd", {"mid_block_type": "UNetMidBlock2DExtra"}, "mid_block_type"),
        ("sd", {"mid_block_type": ["UNetMidBlock2D"]}, "mid_block_type"),
        ("sd", {"act_fn": "mish"}, "act_fn is 'mish'"),
        ("sd", {"norm_eps": "small"}, "norm_eps is 'small'"),
        ("sd", {"cross_attention_dim": [12, 16]}, "one width for all"),
        ("sd", {"attention_type": "gated"}, "attention_type is 'gated'"),
        ("sd", {"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        ("sd", {"class_embed_type": "identity"}, "class_embed_type is 'identity'"),
        ("sd", {"attention_head_dim": 5}, "make no network"),
        ("sd", {"norm_num_groups": 8}, "make no network"),
        ("sdxl", {"class_embed_type": "projection"}, "text_time together"),
        ("if_first", {"cross_attention_norm": "layer_norm"}, "cross_attention_norm is 'layer_norm'"),
        ("if_first", {"attention_head_dim": [4, 2]}, "several numbers of heads"),
        ("if_second", {"mid_block_type": "UNetMidBlock2D"}, "hold for a part only"),
        ("adm", {"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift"),
        ("adm", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ("adm", {"downsample_type": "fir"}, "downsample_type is 'fir'"),
        ("adm", {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]}, "attend to text"),
        ("ddpm", {"freq_shift": 7}, "freq_shift is 7"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, name, change, complaint):
    with pytest.raises(UserError, match=complaint):
        open_network(golden_folder(tmp_path, f"unet2d_{name}", **change), FAMILIES).read()
