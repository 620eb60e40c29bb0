"""What a student's logits lose against a teacher's; B samples, K classes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of the softened classes, averaged over the batch, (B, K), (B, K) -> scalar.

    T^2 keeps the size of the gradient as T grows. Half precision is summed in float32.

    Args:
        student: logits.
        teacher: logits of the same classes; a gradient flows into them too, unless they were made without.
        temperature: T > 0, which divides the logits.

    Raises:
        ValueError: for other shapes or another temperature.

    Source: arXiv:1503.02531.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
        >>> round(float(distillation_loss(student, teacher)), 4)
        0.1308
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"distillation_loss: logits: expected two of one shape (B, K), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; teacher and student must tell the same classes apart"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"distillation_loss: temperature: expected > 0, got {temperature}; 1 leaves the logits alone")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_student, log_teacher = (F.log_softmax(x.to(dtype) / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
