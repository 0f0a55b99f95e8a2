"""The distillation loss: cross-entropy mixed with the divergence from the dense model. Pure math.

Shapes: P = predictions (tokens of all sequences, or images), V = vocabulary or classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TOKENS = 1024  # per chunk: float32 logits of a whole batch would be its largest tensors


def loss(
    student_PV: Tensor,
    teacher_PV: Tensor | None,
    labels_P: Tensor,
    share: float,
    temperature: float,
    count: float | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """(1 - share) * cross-entropy + share * t^2 * KL(teacher || student) at temperature t, the mean over all predictions in
    nats (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2).

    Labels below 0 are ignored. `smoothing`: torch's `label_smoothing`, of the cross-entropy alone. `count` replaces the
    number of predictions as the divisor. Without a teacher it is the cross-entropy alone.
    """
    student, targets = student_PV.split(TOKENS), labels_P.split(TOKENS)
    if teacher_PV is None:
        teacher, share = [None] * len(student), 0.0
    else:
        teacher = teacher_PV.split(TOKENS)
    sums = [
        checkpoint(_chunk, s, t, i, share, temperature, smoothing, use_reentrant=False)
        for s, t, i in zip(student, teacher, targets)
    ]
    return torch.stack(sums).sum() / (labels_P.numel() if count is None else max(count, 1e-9))


def _chunk(
    student_PV: Tensor,
    teacher_PV: Tensor | None,
    ids_P: Tensor,
    share: float,
    temperature: float,
    smoothing: float,
) -> Tensor:
    if teacher_PV is None:
        # 0 if all labels are -100
        return F.cross_entropy(student_PV.float(), ids_P, reduction="sum", label_smoothing=smoothing)
    if (ids_P < 0).any():
        kept_P = ids_P >= 0
        student_PV, teacher_PV, ids_P = student_PV[kept_P], teacher_PV[kept_P], ids_P[kept_P]
    log_PV = F.log_softmax(student_PV.float(), dim=-1)
    hard = F.nll_loss(log_PV, ids_P, reduction="sum")
    if smoothing:  # as torch's cross_entropy, from the log-softmax that is there
        hard = (1 - smoothing) * hard - smoothing * log_PV.mean(-1).sum()
    if temperature == 1:  # one softmax of the student serves both: a pass over the vocabulary costs as much as a layer
        soft_PV, wanted_PV = log_PV, F.log_softmax(teacher_PV.float(), dim=-1)
    else:
        soft_PV = F.log_softmax(student_PV.float() / temperature, dim=-1)
        wanted_PV = F.log_softmax(teacher_PV.float() / temperature, dim=-1)
    soft = F.kl_div(soft_PV, wanted_PV, reduction="sum", log_target=True)
    return (1 - share) * hard + share * temperature**2 * soft
