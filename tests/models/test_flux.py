import jax
import numpy as np
import pytest
from networks import relative_error
from tiny_networks import NETWORKS

from diffjax.nn.patches import patchify, unpatchify

TINY = NETWORKS["flux"]


def test_images_and_texts_of_other_widths_are_refused():
    x, level, cond = TINY.inputs
    for wrong, complaint in (
        ((x[..., :2], level, cond), "2 channels"),
        ((x, level, cond._replace(text=cond.pooled[:, None])), "wide; expected"),
        ((x, level, cond._replace(pooled=None)), "conditioned on text"),
        ((x, level, cond._replace(guidance=None)), "guidance scale"),
    ):
        with pytest.raises(ValueError, match=complaint):
            jax.eval_shape(TINY.net.apply, {"params": TINY.params}, *wrong)


def test_rotary_axes_must_make_a_head():
    with pytest.raises(ValueError, match="rope_dims"):
        jax.eval_shape(TINY.net.clone(rope_dims=(2, 4, 4)).init, jax.random.key(0), *TINY.inputs)


def test_the_words_have_no_order_but_the_patches_have():
    x, level, cond = TINY.inputs
    before = TINY()
    turned = cond._replace(text=cond.text[:, ::-1])
    np.testing.assert_allclose(TINY(x, level, turned), before, atol=1e-4)
    assert relative_error(TINY(x[:, :, ::-1], level, cond)[:, :, ::-1], before) > 0.01


def test_latents_are_packed_by_channel_row_and_column():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    packed = patchify(x, 2, channel_first=True)
    assert packed.shape == (2, 6, 12)
    np.testing.assert_array_equal(packed[1, 4], x[1, 2:4, 2:4].transpose(2, 0, 1).reshape(-1))
    np.testing.assert_array_equal(unpatchify(packed, 2, 4, 6, channel_first=True), x)
