"""Nothing of what is read is run: no pickle, no eval, no remote code anywhere in the package."""

import ast
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import diffjax
from diffjax.errors import UserError
from diffjax.interop.store import Store

# What runs, or unpacks into objects, whatever it is given.
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output", "run_path",
         "run_module", "exec_module", "import_module", "unsafe_load"}  # fmt: skip
WORDS = {"trust_remote_code", "allow_pickle", "shell", "custom_pipeline"}
# What is given by the user and not by files: the configuration that is to be run, and packages of emoji.
FINE = {("main.py", "run_path"), ("data/emoji_catalogue.py", "import_module")}


def sources():
    root = Path(diffjax.__file__).parent
    paths = sorted(root.rglob("*.py"))
    assert len(paths) > 100
    return [
        (path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths
    ]


def found_in(name, tree):
    """What could run foreign code, with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((name, line, module) for module in modules if module.split(".")[0] in MODULES)
        if isinstance(node, ast.keyword) and node.arg in WORDS and ast.unparse(node.value) != "False":
            yield name, node.value.lineno, node.arg
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            of_jax = called == "compile" and isinstance(node.func, ast.Attribute)  # and of re
            if called in CALLS and not of_jax and (name, called) not in FINE:
                yield name, line, called
            if ast.unparse(node.func) == "np.load" and "allow_pickle" not in [k.arg for k in node.keywords]:
                yield name, line, "np.load"


def test_nothing_in_the_package_runs_what_it_reads():
    assert [place for name, tree in sources() for place in found_in(name, tree)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from torch import load",
        "eval('1')",
        "os.system('x')",
        "importlib.import_module(name)",
        "f(trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "runpy.run_path(path)",
    ],
)
def test_what_could_run_it_is_found(code):
    assert len(list(found_in("x.py", ast.parse(code)))) >= 1


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors", "x.pkl"]
)
def test_a_pickle_is_not_run_whatever_it_is_called(tmp_path, name):
    content = pickle.dumps({"a": Harm(str(tmp_path / "ran")), "b": np.zeros(3)})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"a pickle, which can run code|cannot be read as safetensors"):
        Store(tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # it would have
    assert (tmp_path / "ran").exists()
