"""Folders of public pipelines, made of links to the text encoders of golden/text."""

from networks import GOLDEN

# The parts of each pipeline's folder, of those in golden/text.
FOLDERS = {
    "sd15": {"text_encoder": "clip_l", "tokenizer": "tokenizer_clip"},
    "sdxl": {
        "text_encoder": "clip_l", "text_encoder_2": "clip_g",
        "tokenizer": "tokenizer_clip", "tokenizer_2": "tokenizer_clip_g",
    },
    "sd3": {
        "text_encoder": "clip_lp", "text_encoder_2": "clip_g", "text_encoder_3": "t5",
        "tokenizer": "tokenizer_clip", "tokenizer_2": "tokenizer_clip_g", "tokenizer_3": "tokenizer_t5",
    },
    "flux": {
        "text_encoder": "clip_l", "text_encoder_2": "t5",
        "tokenizer": "tokenizer_clip", "tokenizer_2": "tokenizer_t5",
    },
    "pixart": {"text_encoder": "t5", "tokenizer": "tokenizer_t5"},
    "if": {"text_encoder": "t5", "tokenizer": "tokenizer_t5"},
}  # fmt: skip


def pipeline(folder, kind, without=()):
    """A pipeline's folder, of links."""
    for part, name in FOLDERS[kind].items():
        if part not in without:
            (folder / part).symlink_to(GOLDEN / "text" / name)
    return folder
