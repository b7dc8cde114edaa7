"""transformers' Trainer for the stage in which gates and compressors learn from dense attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from nsa_dist.distillation import distill_dense

NEW = ("self_attn.gate.", "k_compressor.", "v_compressor.")
"""What stands in the names of weights that a converted model has beside the dense one's."""


def train_new_weights_only(model: nn.Module) -> None:
    """Freeze a converted model but for its gates and compressors; ``model.requires_grad_(True)``
    ends that."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in NEW))


class DistillationTrainer(Trainer):
    """A ``Trainer`` whose loss is that of ``nsa_dist.distill_dense``.

        train_new_weights_only(model)
        DistillationTrainer(model, arguments, train_dataset=rows).train()

    Evaluation is that of ``Trainer``: the loss of the next token, of the sparse model. It runs in
    one process, or in several by DDP, FSDP2 or DeepSpeed's ZeRO 1 to 3. Activation checkpointing
    does nothing: no gradients pass through the decoder, and little is kept.

    Args:
        args, kwargs: of ``Trainer``.

    Raises:
        ValueError: if weights are trained that do not learn from dense attention, and by training
            if a call cannot be distilled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not any(part in name for part in NEW):
                raise ValueError(
                    "model must have no trained weights but gates and compressors "
                    f"(train_new_weights_only(model)), got {name}"
                )
        # The loss is a mean over each batch: accumulation divides it by the number of batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch, as ``Trainer`` asks for it."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with distill_dense(model) as distilled:
            outputs = model(**inputs)
        if not distilled.loss.requires_grad:
            raise ValueError(
                "gradient_checkpointing_kwargs must be {'use_reentrant': False}, the default, got "
                "a forward without gradients"
            )
        with_outputs = kwargs.get("return_outputs", args[:1] == (True,))
        return (distilled.loss, outputs) if with_outputs else distilled.loss
