"""Inception score (Salimans et al., arXiv 1606.03498), from logits that arrive in batches.

A classifier gives p(y|x) of each sample x. Samples are good if p(y|x) is sharp, and varied if its mean p(y) is broad:

    score = exp(E_x KL(p(y|x) || p(y))),    from 1 to the number of classes

Since E_x p(y|x) = p(y), the exponent is E_x sum_y p(y|x) log p(y|x) - sum_y p(y) log p(y). So two sums over the
samples are enough: that of p(y|x), and that of p(y|x) log p(y|x), the negative entropy. Published scores are means over
splits of 5,000 consecutive samples.
"""

# B = batch, C = classes

from math import exp

import torch
from torch import Tensor

from storage.errors import InputError

SPLIT = 5000
"""Samples of a split in published scores."""


class InceptionScore:
    """The mean of the scores of consecutive splits, in the order of arrival. The last split may be short.

    Args:
        split: samples of a split.

    Examples:
        >>> score = InceptionScore()
        >>> score.update(100 * torch.eye(3))  # three samples, each surely of another class
        >>> round(score.value(), 6)
        3.0
    """

    def __init__(self, split: int = SPLIT) -> None:
        self._split = split
        self._scores: list[float] = []
        self._count, self._negentropy, self._sum = 0, 0.0, torch.zeros(0)

    def update(self, logits: Tensor) -> None:
        """Add samples by their logits (B, C).

        Raises:
            InputError: a logit is not finite.
        """
        if not logits.isfinite().all():
            raise InputError("logits: some are not finite; check the samples and the extractor's weights")
        logs = logits.detach().double().log_softmax(1)
        while len(logs):
            part, logs = logs.tensor_split([self._split - self._count])
            self._add(part)

    def value(self) -> float:
        """The score, from 1 to C.

        Raises:
            InputError: there are no samples.
        """
        scores = self._scores + ([self._current()] if self._count else [])
        if not scores:
            raise InputError("inception score: there are no samples")
        return sum(scores) / len(scores)

    def _add(self, logs: Tensor) -> None:
        p = logs.exp()
        total = p.sum(0).cpu()
        self._sum = self._sum + total if self._count else total
        self._negentropy += float((p * logs).sum())
        self._count += len(p)
        if self._count == self._split:
            self._scores.append(self._current())
            self._count, self._negentropy = 0, 0.0

    def _current(self) -> float:
        q = self._sum / self._count  # p(y)
        return exp(self._negentropy / self._count - float(torch.xlogy(q, q).sum()))
