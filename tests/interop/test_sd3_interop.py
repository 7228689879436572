import jax
import numpy as np
import pytest
from networks import golden_folder, golden_network

from diffjax.errors import UserError
from diffjax.interop.model import open_network
from diffjax.interop.sd3 import FAMILIES
from diffjax.nn.placement import unbox


def test_a_new_table_of_positions_is_that_of_diffusers(tmp_path):
    network, _, arrays = golden_network(tmp_path, "sd3", FAMILIES)

    @jax.jit
    def fresh(key):
        return unbox(network.module.init(key, *network.family.example(network.module))["params"]["positions"])

    np.testing.assert_allclose(fresh(jax.random.key(0)), arrays["fresh_positions"], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"qk_norm": "l2"}, "qk_norm is 'l2'"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
        ({"pos_embed_max_size": 7}, "pos_embed.pos_embed has shape"),
        ({"caption_projection_dim": 24}, "caption_projection_dim is 24"),
        ({"dual_attention_layers": [4]}, "dual_attention_layers"),
        ({"dual_attention_layers": "all"}, "dual_attention_layers"),
        ({"dual_attention_layers": [0]}, "unexpected: transformer_blocks.1.attn2"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"patch_size": 4}, "mis-shaped"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        open_network(golden_folder(tmp_path, "sd35", **change), FAMILIES).read()
