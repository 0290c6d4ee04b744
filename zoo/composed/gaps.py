"""How far positions of image tokens, and of what follows, differ from their columns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.composed.left_out import counted_ahead


class Gaps(NamedTuple):
    """Shifts at each image token of the batch, int64."""

    ahead: Tensor  # (S,) of its own column; (A, S) with positions of several axes
    behind: Tensor  # (S,) of all columns behind it: at the last token of an image, else 0; on all axes alike

    def shift(self, index: Tensor, segment_ids: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        """Return the shift of each column, and of what follows the last: (B, T + 1), or (A, B, T + 1).

        Args:
            index: (B, T) image token of each column, -1 for text.
            segment_ids: (B, T) sample of a packed row; positions of each sample count from 0.
            before: (B, 1) or (A, B, 1) shift of the last column of a cache that is continued.
        """
        index = F.pad(index, (0, 1), value=-1)
        segment_ids = None if segment_ids is None else torch.cat([segment_ids, segment_ids[:, -1:]], 1)
        none = self.behind.new_zeros(1)  # index -1 reads the last entry
        behind = torch.cat([self.behind, none])[index]  # (B, T)
        ahead = torch.cat([self.ahead, none.expand(*self.ahead.shape[:-1], 1)], -1)[..., index]  # (A, B, T)
        passed = counted_ahead(behind, segment_ids)
        return passed + ahead if before is None else passed + ahead + before
