"""The loss of an optimizer step: the mean over the rows or tokens of all its batches, on all processes.

On a GPU the host runs ahead, so that to read a value it would wait for all it has launched. So what is known on the host is
computed there, losses stay on the device, and whether they are finite is read one optimizer step late.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cola_lightning import layout
from cola_lightning.errors import NonFiniteError


class StepLoss:
    """Weighs the batches of an optimizer step by their sizes: those of an accumulation window, on all processes.

    Lightning averages the gradients of such batches as if all had the same size, and how many rows or tokens there are is known
    at the end. So a batch is weighed by its size relative to the window's first batches, and the gradients are then scaled by
    what is missing. With equal sizes both factors are 1, to the bit.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self, scaler: Any = None) -> None:
        """Begins a fit.

        Args:
            scaler: the gradient scaler of its precision, which multiplies losses, and skips steps that are not finite; None:
                it has none.
        """
        self.scaler = scaler
        self._last: tuple[CopiedScalar, str] | None = None  # the loss of the last step, and which one it was
        self._begin_window()

    def _begin_window(self) -> None:
        self.first: float | Tensor | None = None  # the size of the first batches, on all processes
        self.size = 0  # of this process' batches
        self.total: Tensor | None = None  # the sum of the losses of this process' rows or tokens
        self.unweighed: Tensor | None = None  # the sum of the losses of batches

    def weigh(self, loss: Tensor, size: int | None) -> Tensor:
        """The loss that ``training_step`` returns for a batch; all processes must call this.

        Args:
            loss: a scalar, the mean over ``size``.
            size: the number of rows or tokens; None: all batches weigh alike, as Lightning has it.
        """
        with torch.no_grad():
            total = loss.float() * (1 if size is None else size)
            self.total = total if self.total is None else self.total + total
        self.size += 1 if size is None else size
        if size is None:
            return loss
        if self.first is None:
            is_alone = not layout.has_processes()
            self.first = _at_least_1(float(size) if is_alone else layout.sum_over_processes([size], loss.device)[0])
        factor = size * layout.n_processes() / self.first
        if isinstance(factor, Tensor):  # which the host need not know
            return loss * factor.to(loss.dtype)
        return loss if factor == 1 else loss * factor

    def add(self, loss: Tensor) -> None:
        """Records a batch's loss before its backward pass, so that it is checked if it was not weighed."""
        if self.total is None:
            loss = loss.detach()
            if self.scaler is not None:  # on the device, see above
                loss = loss / self.scaler.scale(torch.ones_like(loss))
            self.unweighed = loss if self.unweighed is None else self.unweighed + loss

    def finish(self, optimizer: Optimizer, n_batches: int, step: str) -> Tensor | None:
        """Scales the gradients at the window's end, and begins the next; all processes must call this.

        Args:
            optimizer: of the parameters.
            n_batches: of a full window, by which Lightning has divided each loss.
            step: how an error names this step.

        Returns:
            The window's mean loss, a scalar on the device; None if no batch was weighed.
        """
        mean = None
        if self.total is not None:
            total, size = self.total, _at_least_1(float(self.size))
            if self.first is not None:
                if layout.has_processes():
                    total, size = layout.sum_over_processes([total, size], total.device)
                    size = _at_least_1(size)
                _scale_gradients(optimizer, self.first * n_batches / size)
            mean = (total / size).float()
        checked = self.unweighed if mean is None else mean
        self._last = None if checked is None else (CopiedScalar(checked), step)
        self._begin_window()
        return mean

    def check(self) -> float | None:
        """The loss of the last step that was finished; None if there is none.

        Raises:
            NonFiniteError: if it is not finite. A gradient scaler skips the first such steps, until its scale is below 1.
        """
        if self._last is None:
            return None
        late, step = self._last
        loss = late.read()
        if not math.isfinite(loss) and (self.scaler is None or self.scaler.get_scale() < 1):
            raise NonFiniteError(
                f"the training loss is {loss} at {step}; a lower learning rate or trainer.gradient_clip_val may help"
            )
        return loss


class CopiedScalar:
    """A value that is copied to the host in the background, so that reading it later hardly waits.

    Args:
        value: a scalar.
    """

    def __init__(self, value: Tensor) -> None:
        # In the background by CUDA alone: a Mac's GPU has no such event (https://github.com/pytorch/pytorch/issues/140296).
        self._value = value.to("cpu", non_blocking=value.is_cuda)
        self._copied = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None

    def read(self) -> float:
        """The value."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()


def _at_least_1(size: float | Tensor) -> float | Tensor:
    return size.clamp(min=1) if isinstance(size, Tensor) else max(1.0, size)


def _scale_gradients(optimizer: Optimizer, scale: float | Tensor) -> None:
    if not isinstance(scale, Tensor) and scale == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients:
        torch._foreach_mul_([layout.local(gradient) for gradient in gradients], scale)
