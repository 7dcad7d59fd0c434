"""Several processes that train together, one a device (`accelerate launch`); alone, everything here is the identity.

Each process takes every n-th user of a step, and gradients are summed before the step is made, so the steps are those of one
process with the same users. Only the gradients of what is learned travel, a few megabytes.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from palate.errors import MissingExtraError


class Team:
    """The processes of this run. Attributes: rank of this one, size of the team."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # as torchrun and accelerate set it
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise MissingExtraError("several processes need the package accelerate; run: pip install 'palate[hf]'") from error
            state = PartialState(cpu=not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
            self.rank, self.size = state.process_index, state.num_processes

    def share(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """The users of this process, as many in each, and which of them are real: the last may be there to fill up."""
        n = -(-len(users) // self.size)
        place = torch.arange(n) * self.size + self.rank
        return users[place.clamp(max=len(users) - 1)], place < len(users)

    def gather(self, own: Tensor) -> Tensor:
        """The tensors of all processes, in the order of the processes."""
        if self.size == 1:
            return own
        from accelerate.utils import gather

        found: Tensor = gather(own.contiguous())
        return found

    def own(self, together: Tensor) -> Tensor:
        """The part of this process of what `gather` made."""
        n = len(together) // self.size
        return together[self.rank * n : (self.rank + 1) * n]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up the tensors of all processes, in place."""
        if self.size == 1:
            return
        from accelerate.utils import reduce

        for tensor in tensors:
            tensor.copy_(reduce(tensor, "sum"))
