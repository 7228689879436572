"""Scores of single pictures, of pictures with their captions, and of pictures of one caption."""

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations

import numpy as np

from diffjax.errors import UserError
from diffjax.evaluation.distances import unit
from diffjax.evaluation.errorbars import Value, mean_error

_BATCH = 64


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int | None = 0) -> Value:
    """`exp(E KL(p(y|x) | p(y)))`: from 1 to the number of classes (Salimans et al., 2016).

    As in the literature, what is given with the mean is the *spread* of the score over the splits. Comparable
    with others' only if the classifier is Inception-v3 with its own weights and 50,000 pictures are scored.

    Args:
      logits: a classifier's, `[n, classes]`.
      splits: parts of equal size but for one that the score is computed on; at most n.
      seed: of the order in which the pictures are split; None for the order that they have.
    """
    logits = np.asarray(logits, np.float64)
    if not 1 <= splits <= len(logits):
        raise UserError(f"the Inception score of {len(logits)} pictures cannot be split into {splits} parts.")
    if seed is not None:
        logits = logits[np.random.default_rng(seed).permutation(len(logits))]
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    ends = [i * len(log_p) // splits for i in range(1, splits)]
    scores = [_inception_score(part) for part in np.split(log_p, ends)]
    return Value(float(np.mean(scores)), float(np.std(scores)))


def _inception_score(log_p: np.ndarray) -> float:
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    log_marginal = np.log(np.where(marginal > 0.0, marginal, 1.0))  # where it is 0, so is p
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1, where=p > 0.0).mean()))


def clip_score(images: np.ndarray, texts: np.ndarray) -> Value:
    """`100 max(cos, 0)`, as torchmetrics and most papers on text to image have it.

    Args:
      images: embeddings of pictures by CLIP, `[n, width]`.
      texts: those of their captions, `[n, width]`.
    """
    return mean_error(100.0 * _cosines(images, texts).clip(0.0))


def clip_s(images: np.ndarray, texts: np.ndarray) -> Value:
    """`2.5 max(cos, 0)`: "CLIPScore" as Hessel et al. (2021) define it; the arguments are `clip_score`'s."""
    return mean_error(2.5 * _cosines(images, texts).clip(0.0))


def r_precision(
    images: np.ndarray, texts: np.ndarray, captions: Sequence[str], *, wrong: int = 99, seed: int = 0
) -> Value:
    """The share of pictures that are nearer to their own caption than to `wrong` others (Xu et al., 2018).

    Nearness is the cosine; what is as near as the own caption counts as nearer, so that a network that does
    not look scores 0. Chance scores 1 / (wrong + 1).

    Args:
      images: embeddings of pictures, `[n, width]`.
      texts: those of their captions by the network's other half, `[n, width]`.
      captions: the captions, n of them; those that are repeated are drawn as one.
      wrong: captions of other pictures to be told apart from the own, different ones for each picture.
      seed: of their choice.
    """
    distinct = {caption: i for i, caption in reversed(list(enumerate(captions)))}
    names, rows = list(distinct), np.array(list(distinct.values()))
    if not 0 < wrong < len(names):
        raise UserError(
            f"R-precision with {wrong} wrong captions needs {wrong + 1} different ones; "
            f"there are {len(names)}."
        )
    place = {caption: i for i, caption in enumerate(names)}
    a, b, rng = unit(images), unit(texts), np.random.default_rng(seed)
    hits = np.empty(len(captions))
    for i, caption in enumerate(captions):
        others = rng.choice(len(names) - 1, wrong, replace=False)
        others += others >= place[caption]  # all but its own
        hits[i] = a[i] @ b[rows[place[caption]]] > (b[rows[others]] @ a[i]).max()
    return mean_error(hits)


def diversity(
    images: np.ndarray,
    prompts: Sequence[Hashable],
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Value:
    """How different the pictures of one prompt are: the mean distance of its pairs, then over the prompts.

    With LPIPS as the distance it is the diversity that papers on translation between images report.

    Args:
      images: `[n, ...]`.
      prompts: which prompt each was made for; those of a single picture do not count.
      distance: `[m, ...], [m, ...] -> [m]`, symmetric; m is at most 64.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    groups = {prompt: members for prompt, members in groups.items() if len(members) > 1}
    if not groups:
        raise UserError("diversity needs at least two pictures of a prompt; there is one of each.")
    pairs = np.array([pair for members in groups.values() for pair in combinations(members, 2)])
    blocks = (pairs[i : i + _BATCH].T for i in range(0, len(pairs), _BATCH))
    distances = np.concatenate([distance(images[left], images[right]) for left, right in blocks])
    counts = [len(members) * (len(members) - 1) // 2 for members in groups.values()]
    return mean_error(np.array([part.mean() for part in np.split(distances, np.cumsum(counts)[:-1])]))


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (unit(a) * unit(b)).sum(axis=-1)
