"""Every loss as a pure function of tensors. Nothing here knows a model, a file or a device."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target of a token that is not trained


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over trained tokens of -log softmax(logits)[target], in nats, fp32 scalar.

    logits (..., V) of any float dtype; targets (...) integer, IGNORE where not trained. It is a sum, never a mean: the
    caller divides by the trained tokens of the whole optimizer step, so that no split of a batch changes a gradient.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
