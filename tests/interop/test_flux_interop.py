import pytest
from networks import golden_folder

from diffjax.errors import UserError
from diffjax.interop.flux import FAMILIES
from diffjax.interop.model import open_network


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"patch_size": 2}, "patch_size is 2"),
        ({"in_channels": 18}, "multiples of 4"),
        ({"out_channels": 6}, "multiples of 4"),
        ({"axes_dims_rope": [2, 4, 4]}, "axes_dims_rope"),
        ({"axes_dims_rope": [3, 5, 4]}, "axes_dims_rope"),
        ({"axes_dims_rope": [12]}, "axes_dims_rope"),
        ({"guidance_embeds": "yes"}, "guidance_embeds is 'yes'"),
        ({"guidance_embeds": False}, "unexpected: time_text_embed.guidance_embedder"),
        ({"num_single_layers": 1}, "unexpected: single_transformer_blocks.1"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        open_network(golden_folder(tmp_path, "flux_dev", **change), FAMILIES).read()
