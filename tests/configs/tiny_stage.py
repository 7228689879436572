# The base stage of tiny.py alone, without previews; it is there for the tests and shows nothing.
#
#   python -m diffjax.main --config=tests/configs/tiny_stage.py --workdir=/tmp/tiny

import importlib.util
from pathlib import Path


def get_config():
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = tiny.get_config().stages.base.train.copy_and_resolve_references()
    config.preview.every, config.checkpoint.keep = 0, 8
    config.optimizer.decay = "constant"  # so that runs may differ in length
    return config
