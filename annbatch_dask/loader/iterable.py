"""torch's IterableDataset, which loaders are where torch is installed: a DataLoader takes nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["IterableDataset"]

if TYPE_CHECKING:
    from torch.utils.data.dataset import IterableDataset
else:
    try:
        from torch.utils.data import IterableDataset
    except ImportError:

        class IterableDataset:
            """Stands in for torch's."""
