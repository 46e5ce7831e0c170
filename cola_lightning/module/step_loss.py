"""The loss of an optimizer step: the mean over the rows or tokens of all its batches, on all processes."""

from torch import Tensor
from torch.optim import Optimizer

from cola_lightning import layout


class StepLoss:
    """Weighs the batches of an optimizer step by their sizes: those of an accumulation window, on all processes.

    Lightning averages the gradients of such batches as if all had the same size, and how many rows or tokens there are is known
    at the end. So a batch is weighed by its size relative to the window's first batches, and the gradients are then scaled by
    what is missing. With equal sizes both factors are 1, to the bit.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begins a window."""
        self.first, self.size = 0.0, 0.0  # of the first batches, on all processes; of this process' batches
        self.total: Tensor | None = None  # the sum of the losses of this process' rows or tokens

    def weigh(self, loss: Tensor, size: int) -> Tensor:
        """The loss that ``training_step`` returns for a batch; all processes must call this.

        Args:
            loss: a scalar, the mean over ``size``.
            size: the number of rows or tokens.
        """
        total = loss.detach().float() * size
        if self.total is None:
            self.first = max(1.0, layout.sum_over_processes([size], loss.device)[0])
        self.total = total if self.total is None else self.total + total
        self.size += size
        return loss * (size * layout.n_processes() / self.first)

    def finish(self, optimizer: Optimizer, n_batches: int) -> float | None:
        """Scales the gradients at the window's end, and begins the next; all processes must call this.

        Args:
            optimizer: of the parameters.
            n_batches: of a full window, by which Lightning has divided each loss.

        Returns:
            The window's mean loss; None if no batch was weighed.
        """
        if self.total is None:
            return None
        total, size = layout.sum_over_processes([self.total, self.size], self.total.device)
        size = max(1.0, size)
        if (scale := self.first * n_batches / size) != 1:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)
        self.begin()
        return total / size
