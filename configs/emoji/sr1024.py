"""Super-resolution stage of the emoji cascade: 256 to 1024 px, Imagen's Efficient U-Net on crops of 256
px.

Command:   python -m diffjax.main --config=configs/emoji/sr1024.py --workdir=runs/emoji/sr1024
Hardware:  meant for one GPU or TPU with 40 GB or more; on several, `mesh.data` takes them all.
Time:      not measured yet.
Result:    not trained yet at this size; configs/quickstart.py is the one with measured results.

The same network as configs/emoji/sr256.py with one more level and without self-attention, so that what
was trained on crops works on whole images. Add it to configs/emoji/cascade.py as a third stage.
"""

from ml_collections import ConfigDict

from configs.emoji import sr256


def get_config() -> ConfigDict:
    config = sr256.get_config()
    config.resolution = 1024
    config.crop = 256
    config.low_res.resolution = 256
    config.batch_size = 64
    config.data.resolution = 1024
    config.model.multipliers = (1, 2, 4, 6, 6)
    config.model.blocks = (2, 4, 4, 4, 4)
    config.model.self_attention = (False,) * 5
    config.model.cross_attention = (False, False, False, False, True)
    return config
