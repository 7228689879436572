"""The tables of layers: every kind of row by hand, and what is read of the files on several devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from diffjax.errors import UserError
from diffjax.interop.rows import Row, check, read_params, sources, to_tensors
from diffjax.interop.store import Store

ROWS = [
    Row("blocks.{i}.fc", "blocks/fc"),
    *(Row("blocks.{i}.qkv", f"blocks/{name}", chunk=(i, 3)) for i, name in enumerate(("q", "k", "v"))),
    Row("late.{i}.norm", "late/norm", "norm", first=2),
    Row("late.{i}.scale", "late/scale", "raw", first=2),
    Row("patch", "patch", "patch", window=2),
    Row("conv", "conv", "conv"),
    Row("point", "point", "pointwise"),
    Row("out.linear", "out", order=(2, 0, 1)),
    Row("words", "words", "embed"),
    Row("place", "place", "raw"),
    Row("tied.{i}.fc", "tied", equal=2),
]


def expected_params(theirs):
    """What the tables mean, one layer at a time."""
    fc = [theirs[f"blocks.{i}.fc.weight"].T for i in range(2)]
    ours = {
        "blocks": {
            "fc": {
                "kernel": np.stack(fc),
                "bias": np.stack([theirs[f"blocks.{i}.fc.bias"] for i in range(2)]),
            },
        },
        "late": {
            "norm": {"scale": np.stack([theirs["late.2.norm.weight"], theirs["late.3.norm.weight"]])},
            "scale": np.stack([theirs["late.2.scale"], theirs["late.3.scale"]]),
        },
        "patch": {"kernel": np.zeros((12, 5), np.float32), "bias": theirs["patch.bias"]},
        "conv": {"kernel": np.einsum("oihw->hwio", theirs["conv.weight"]), "bias": theirs["conv.bias"]},
        "point": {"kernel": theirs["point.weight"][:, :, 0, 0].T, "bias": theirs["point.bias"]},
        "words": {"embedding": theirs["words.weight"]},
        "place": theirs["place"],
        "tied": {"kernel": theirs["tied.0.fc.weight"].T, "bias": theirs["tied.0.fc.bias"]},
    }
    for i, name in enumerate("qkv"):
        rows = slice(8 * i, 8 * i + 8)
        kernels = [theirs[f"blocks.{n}.qkv.weight"][rows].T for n in range(2)]
        biases = [theirs[f"blocks.{n}.qkv.bias"][rows] for n in range(2)]
        ours["blocks"][name] = {"kernel": np.stack(kernels), "bias": np.stack(biases)}
    for row, column, channel in np.ndindex(2, 2, 3):
        pixel = (2 * row + column) * 3 + channel
        ours["patch"]["kernel"][pixel] = theirs["patch.weight"][:, channel, row, column]
    parts = {kind: np.split(theirs[f"out.linear.{kind}"], 3) for kind in ("weight", "bias")}
    first, second, third = parts["weight"]
    ours["out"] = {"kernel": np.concatenate([third, first, second]).T}
    first, second, third = parts["bias"]
    ours["out"]["bias"] = np.concatenate([third, first, second])
    return ours


def random_tensors():
    random = np.random.default_rng(0)
    shapes = {"place": (1, 4, 6), "words.weight": (10, 4), "patch.weight": (5, 3, 2, 2), "patch.bias": (5,)}
    shapes |= {
        "conv.weight": (4, 2, 3, 3),
        "conv.bias": (4,),
        "point.weight": (4, 2, 1, 1),
        "point.bias": (4,),
    }
    shapes |= {"out.linear.weight": (6, 4), "out.linear.bias": (6,)}
    for i in range(2):
        shapes |= {f"blocks.{i}.fc.weight": (16, 8), f"blocks.{i}.fc.bias": (16,)}
        shapes |= {f"blocks.{i}.qkv.weight": (24, 8), f"blocks.{i}.qkv.bias": (24,)}
        shapes |= {f"late.{i + 2}.norm.weight": (8,), f"late.{i + 2}.scale": (2, 8)}
        shapes |= {f"tied.{i}.fc.weight": (4, 2), f"tied.{i}.fc.bias": (4,)}
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return tensors | {name.replace("tied.0", "tied.1"): tensors[name] for name in tensors if "tied.0" in name}


class SpyStore(Store):
    """A store that remembers how many bytes were read at a time."""

    def __init__(self, folder):
        super().__init__(folder)
        self.reads = []

    def read(self, name, index=()):
        tensor = super().read(name, index)
        self.reads.append((name, tensor.nbytes))
        return tensor


@pytest.fixture
def theirs():
    return random_tensors()


@pytest.fixture
def folder(theirs, tmp_path):
    save_file(theirs, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def table(theirs):
    return sources(ROWS, expected_params(theirs))


def assert_equal_trees(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_kind_of_row(folder, theirs, table):
    with Store(folder) as store:
        check(store, table)
        params = read_params(store, table)
    assert_equal_trees(params, expected_params(theirs))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_back_to_their_names_and_bits(theirs, table):
    tensors = to_tensors(expected_params(theirs), table)
    assert tensors.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensors[name].shape == tensor.shape, name
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


@pytest.mark.parametrize("kept", [np.float16, jnp.bfloat16, np.float64])
def test_dtypes_are_cast(tmp_path, theirs, table, kept):
    save_file({name: tensor.astype(kept) for name, tensor in theirs.items()}, tmp_path / "model.safetensors")
    for wanted in (np.float32, jnp.bfloat16):
        with Store(tmp_path) as store:
            params = read_params(store, table, dtype=wanted)
        expected = expected_params(
            {name: tensor.astype(kept).astype(wanted) for name, tensor in theirs.items()}
        )
        assert_equal_trees(params, jax.tree.map(np.asarray, expected))
        assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(params))


def test_a_linear_layer_may_be_a_pointwise_convolution(tmp_path, theirs, table):
    changed = {**theirs, "point.weight": theirs["point.weight"][:, :, 0, 0]}
    changed["blocks.1.fc.weight"] = theirs["blocks.1.fc.weight"][..., None, None]
    save_file(changed, tmp_path / "model.safetensors")
    with Store(tmp_path) as store:
        check(store, table)
        assert_equal_trees(read_params(store, table), expected_params(theirs))


@pytest.mark.parametrize(
    "axes", [("data", "fsdp"), ("fsdp", "data"), (None, "fsdp"), (("data", "fsdp"),), ()]
)
def test_divided_over_devices_each_reads_its_part(folder, theirs, table, axes):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    sizes = dict(mesh.shape)

    def place(leaf):
        """Divided where it can be, beginning with the last axis."""
        names = [None] * leaf.ndim
        for position, name in enumerate(axes[: leaf.ndim], start=1):
            parts = np.prod([sizes[part] for part in (name if isinstance(name, tuple) else (name,)) if part])
            if leaf.shape[-position] % parts == 0:
                names[-position] = name
        return NamedSharding(mesh, PartitionSpec(*names))

    shardings = jax.tree.map(place, expected_params(theirs))
    with SpyStore(folder) as store:
        params = read_params(store, table, shardings=shardings)
        reads = store.reads
    assert_equal_trees(params, expected_params(theirs))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    of_fc = [size for name, size in reads if name == "blocks.0.fc.weight"]
    kernel = params["blocks"]["fc"]["kernel"].sharding
    shard = np.prod(kernel.shard_shape((2, 8, 16))[1:])
    assert max(of_fc) == 4 * shard
    # A third of it is one of ours.
    of_qkv = max(size for name, size in reads if name == "blocks.0.qkv.weight")
    assert of_qkv <= theirs["blocks.0.qkv.weight"].nbytes / 3
    # No more than a copy of a layer is ever read at a time, however many are stacked.
    assert max(size for _, size in reads) <= max(tensor.nbytes for tensor in theirs.values())


def test_one_devices_part_of_a_stack_reads_its_copies_only(folder, table):
    with SpyStore(folder) as store:
        part = table["blocks/fc/kernel"].read(store, (slice(1, 2), slice(None), slice(4, 8)))
        assert part.shape == (1, 8, 4)
        assert store.reads == [("blocks.1.fc.weight", 4 * 8 * 4)]


def test_a_convolution_is_no_linear_layer(tmp_path):
    save_file({"conv.weight": np.zeros((4, 2), np.float32)}, tmp_path / "model.safetensors")
    table = sources([Row("conv", "conv", "conv")], {"conv": {"kernel": np.zeros((1, 1, 2, 4))}})
    with (
        Store(tmp_path) as store,
        pytest.raises(UserError, match=r"has shape \(4, 2\), expected \(4, 2, 1, 1"),
    ):
        check(store, table)


def test_what_is_wrong_with_a_folder_is_listed_by_name(tmp_path, theirs, table):
    del theirs["conv.bias"], theirs["late.3.scale"]
    theirs["extra.weight"] = theirs["unused.thing"] = np.zeros(1, np.float32)
    theirs["point.weight"] = np.zeros((2, 4, 1, 1), np.float32)
    theirs["conv.weight"] = np.zeros((4, 2), np.float32)
    theirs["place"] = np.zeros((1, 4, 6), np.int8)
    save_file(theirs, tmp_path / "model.safetensors")
    message = (
        f"{tmp_path}: its tensors are not those that the network needs.\n"
        "missing: conv.bias, late.3.scale\n"
        "unexpected: extra.weight\n"
        "mis-shaped: conv.weight has shape (4, 2), expected (4, 2, 3, 3), place is I8, "
        "expected one of F16, BF16, F32, F64, point.weight has shape (2, 4, 1, 1), expected (4, 2, 1, 1)"
    )
    with Store(tmp_path) as store, pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        check(store, table, lambda name: name.startswith("unused."))


def test_a_long_list_is_cut(tmp_path, theirs, table):
    many = {f"x{i:02d}": np.zeros(1, np.float32) for i in range(23)}
    save_file(theirs | many, tmp_path / "model.safetensors")
    with Store(tmp_path) as store, pytest.raises(UserError, match=r"unexpected: x00, .*x19 and 3 more$"):
        check(store, table)


def test_a_table_that_does_not_fit_its_network_is_an_error(theirs):
    shapes = expected_params(theirs)
    with pytest.raises(ValueError, match=r"has no row for conv/bias, conv/kernel$"):
        sources([row for row in ROWS if row.ours != "conv"], shapes)
    with pytest.raises(ValueError, match="conv/kernel has two rows"):
        sources([*ROWS, Row("again", "conv", "conv")], shapes)
    with pytest.raises(ValueError, match="stands for no parameter"):
        sources([*ROWS, Row("ghost", "ghost")], shapes)
