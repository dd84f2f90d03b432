"""What to take of the outputs of a module that returns more than a place stands for.

Each is a :data:`kd_mm.hosts.table.Pick`: (module, outputs) -> outputs.
"""

from typing import Any

import torch
from torch import Tensor

from kd_mm.ops.functional import lift
from kd_mm.types.batch import Features


def last(head: Any, outputs: Features) -> Features:
    """Keep only the last output.  In training these modules return one per branch, in evaluation only the last."""
    return outputs[-1:]


def maps(module: Any, outputs: Features) -> Features:
    """Maps without the class tokens (N, C) that a vision transformer returns beside them (DPT)."""
    return tuple(tensor for tensor in outputs if tensor.dim() == 4) or outputs


def main_branch(head: Any, outputs: Features) -> Features:
    """Keep the main branch.  In training a PIDNet returns (detail, main, boundary), in evaluation only the main one."""
    return outputs[1:2] if len(outputs) == 3 else outputs


def semantic_logits(scores: Tensor, masks: Tensor, eps: float = 1e-6) -> Tensor:
    """Class logits for every pixel of queries that each have a class and a mask.

    ``log max(sum_q softmax(class_q)_k * sigmoid(mask_q)_hw, eps)``: the softmax of it over the classes is the share of
    each class in the scores that the model predicts with (its largest one is the prediction), so that losses on logits
    compare it with a head that has a class for every pixel.

    Args:
        scores: class logits of the queries (N, Q, K + 1), the last class is "nothing".
        masks: mask logits (N, Q, H, W).
        eps: score of a pixel that no query of the class covers.

    Returns:
        (N, K, H, W), in full precision.

    Example:
        >>> scores, masks = torch.tensor([[[50., 0., 0.], [0., 50., 0.]]]), torch.tensor([50., 0.]).view(1, 2, 1, 1)
        >>> semantic_logits(scores, masks).softmax(dim=1).flatten()
        tensor([0.6667, 0.3333])
    """
    with torch.autocast(scores.device.type, enabled=False):
        shares = lift(scores).softmax(dim=-1)[..., :-1]
        return torch.einsum('nqk,nqhw->nkhw', shares, lift(masks).sigmoid()).clamp(min=eps).log()


def queries(head: Any, outputs: Features) -> Features:
    """Logits of the last decoder layer, from the class scores of every layer followed by the masks of every layer."""
    scores, masks = outputs[len(outputs) // 2 - 1], outputs[-1]
    if scores.dim() == 4:  # all layers in one tensor
        scores, masks = scores[-1], masks[-1]
    return (semantic_logits(scores, masks), )


def yolo_v3(head: Any, outputs: Features) -> Features:
    """Keep the class channels among A * (4 box, 1 objectness, K class)."""
    width = head.num_attrib

    def classes(tensor: Tensor) -> Tensor:
        count, channels, height, cells = tensor.shape
        return tensor.reshape(count, channels // width, width, height, cells)[:, :, 5:].flatten(1, 2)

    return tuple(classes(tensor) for tensor in outputs)


def yolo_v5(head: Any, outputs: Features) -> Features:
    """Keep the class channels among A * (4 box, 1 objectness, K class, and coefficients of masks where there are any).

    Args:
        head: with ``num_base_priors`` (A) and ``num_classes`` (K).
    """
    anchors, count = head.num_base_priors, head.num_classes
    return tuple(tensor.unflatten(1, (anchors, -1))[:, :, 5:5 + count].flatten(1, 2) for tensor in outputs)
