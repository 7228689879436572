import jax
import numpy as np
import pytest
from tiny_networks import NETWORKS

from diffjax.models.mmdit import Stack, stacks

TINY = NETWORKS["mmdit"]


def test_images_and_texts_of_other_widths_are_refused():
    x, level, cond = TINY.inputs
    for wrong, complaint in (
        ((x[..., :2], level, cond), "2 channels"),
        ((x, level, cond._replace(text=cond.pooled[:, None])), "wide; expected"),
        ((x, level, cond._replace(pooled=None)), "conditioned on text"),
        ((np.zeros((3, 4, 14, 3)), level, cond), "positions for 6 x 6"),
    ):
        with pytest.raises(ValueError, match=complaint):
            jax.eval_shape(TINY.net.apply, {"params": TINY.params}, *wrong)


def test_alike_blocks_are_one_stack_and_the_last_is_alone():
    assert stacks(24, ()) == [Stack(0, 23, False, False), Stack(23, 1, False, True)]
    assert stacks(4, (1, 3)) == [
        Stack(0, 1, False, False),
        Stack(1, 1, True, False),
        Stack(2, 1, False, False),
        Stack(3, 1, True, True),
    ]
    assert stacks(1, ()) == [Stack(0, 1, False, True)]
    names = {stack.name for stack in stacks(TINY.net.depth, TINY.net.dual_attention)}
    assert names == {"blocks_0", "blocks_2", "blocks_3"} <= TINY.params.keys()
