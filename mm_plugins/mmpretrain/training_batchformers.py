"""BatchFormers that are trained with a model of MMPretrain, whose weights are drawn otherwise.

They keep PyTorch's initial weights, as the authors' do. A checkpoint that is evaluated need not
have them.
"""

from __future__ import annotations

from mm_plugins.batchformer import BatchFormers
from plugin_core import BatchFormer


class TrainingBatchFormer(BatchFormer):
    """One BatchFormer, which nothing but training uses."""

    training_only = True

    def init_weights(self) -> None:
        """Draw the weights anew; mmengine calls it after what the model's ``init_cfg`` says."""
        self.reset_parameters()


class TrainingBatchFormers(BatchFormers):
    """Those between a network's layers, which evaluation uses with ``eval=True`` only."""

    def init_weights(self) -> None:
        """Draw the weights anew; mmengine calls it after what the model's ``init_cfg`` says."""
        for module in self.values():
            assert isinstance(module, BatchFormer)
            module.reset_parameters()

    @property
    def training_only(self) -> bool:
        """Whether a checkpoint that is evaluated need not have it."""
        return not self.in_evaluation
