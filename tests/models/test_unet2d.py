import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import compiled, relative_error
from tiny_networks import NETWORKS

from diffjax.nn.conditioning import NO_LABEL

TINY = NETWORKS["unet2d"]
X, LEVEL, COND = TINY.inputs
TWO = {
    "channels": (4, 4),
    "blocks": (1, 1),
    "attention": ("", ""),
    "up_attention": (),
    "heads": (1, 1),
    "depth": (),
    "resample": ("conv", "conv"),
}


def test_the_low_resolution_image_follows_the_noisy_one():
    joined = jnp.concatenate([X, COND.low_res], axis=-1)
    np.testing.assert_array_equal(TINY(joined, LEVEL, COND._replace(low_res=None)), TINY())


def test_no_class_adds_nothing():
    assert COND.label.tolist() == [2, 0, NO_LABEL]
    others = {name: value for name, value in TINY.params.items() if name != "label"}
    unconditional = compiled(TINY.net.clone(classes=0))(others, *TINY.inputs)
    np.testing.assert_allclose(TINY()[2], unconditional[2], atol=1e-5)
    assert relative_error(TINY()[0], unconditional[0]) > 1e-3


@pytest.mark.parametrize(
    ("change", "x", "cond", "complaint"),
    [
        ({"blocks": (1, 1)}, X, COND, "blocks has 2 entries"),
        ({"depth": ((1, 2),)}, X, COND, "do not fit"),
        ({"attention": ("text",)}, X, COND, "expected some of"),
        ({"text_embed": 0}, X, COND, "needs text_embed"),
        ({"remat": "some"}, X, COND, "remat is 'some'"),
        ({"modulation": "film"}, X, COND, "modulation 'film'"),
        ({"heads": (3,)}, X, COND, "not divisible by 3 heads"),
        (TWO, X[:, :3], COND._replace(low_res=COND.low_res[:, :3]), "images of 3x4; .* multiples of 2"),
        ({}, X, COND._replace(low_res=None), "in_channels is 6"),
        ({}, X, COND._replace(text=None), "told cond.text"),
        ({}, X, COND._replace(label=None), "told cond.label"),
        ({"aug_level": True}, X, COND, "told cond.aug_level"),
    ],
)
def test_what_does_not_fit_is_refused(change, x, cond, complaint):
    with pytest.raises(ValueError, match=complaint):
        jax.eval_shape(TINY.net.clone(**change).init, jax.random.key(0), x, LEVEL, cond)
