"""Native Sparse Attention in a torchtitan config: its model, parallelism and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchtitan.config import derive
from torchtitan.models.common.decoder import Decoder
from torchtitan.trainer import Trainer

from nsa_dist.adapters.torchtitan.attention import (
    NSAttention,
    model_sizes,
    nsa_attention_config,
    nsa_config,
)
from nsa_dist.adapters.torchtitan.checks import check_model, check_options, check_run, layout_of
from nsa_dist.adapters.torchtitan.state_dict import nsa_adapter
from nsa_dist.checks import check
from nsa_dist.config import NSAConfig


def use_nsa(config: Trainer.Config, nsa: NSAConfig | None = None, **options: Any) -> Trainer.Config:
    """Replace the attention of every layer of a torchtitan run by Native Sparse Attention.

    Call it in a config function, which torchtitan finds by ``--module`` and ``--config``; options
    of the command line are applied, and checked, later. CUDA graphs are switched off.

    Args:
        config: what a config function of torchtitan returns; changed in place.
        nsa: the hyperparameters, with the model's heads and widths. None for those of ``options``.
        options: of ``NSAConfig``, without heads and widths.

    Returns:
        ``config``.

    Raises:
        ValueError: if the model's attention cannot be replaced, or an option is not allowed.
    """
    check(isinstance(config, Trainer.Config), "config", config, "a Trainer.Config of torchtitan")
    spec = config.model_spec
    check(spec is not None, "config.model_spec", spec, "the spec of a model")
    check_model(spec.model)
    first = spec.model.layers[0].attention
    if nsa is None:
        nsa = nsa_config(first, options)
    else:
        check(not options, "options", sorted(options), "none beside an NSAConfig")
    check(isinstance(nsa, NSAConfig), "nsa", nsa, "an NSAConfig or None")
    check_options(nsa)
    for layer in spec.model.layers:
        for name, size in model_sizes(layer.attention).items():
            check(getattr(nsa, name) == size, name, getattr(nsa, name), f"the model's {size}")
    model = derive(spec.model, _nsa_model(type(spec.model)._owner).Config, nsa=nsa)
    config.model_spec = replace(
        spec,
        model=model,
        parallelize_fn=_with_graph_breaks(spec.parallelize_fn),
        state_dict_adapter=nsa_adapter(spec.state_dict_adapter),
    )
    config.training.disable_cuda_graphs = True
    return config


@cache
def _nsa_model(dense: type[Decoder]) -> type[Decoder]:
    """A model class whose config replaces its layers' attention once the run's options are known.

    torchtitan shards the config's dense layers first, so that what stays is sharded as it says.
    """

    class NSAModel(dense):
        @dataclass(kw_only=True, slots=True)
        class Config(dense.Config):  # type: ignore[name-defined]
            nsa: NSAConfig

            def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
                check_run(config, self.nsa)
                dense.Config.update_from_config(self, config=config, **kwargs)
                layout = layout_of(config.parallelism.context_parallel_load_balancer)
                for layer in self.layers:
                    layer.attention = nsa_attention_config(layer.attention, self.nsa, layout)

    NSAModel.__name__ = NSAModel.__qualname__ = f"NSA{dense.__name__}"
    return NSAModel


def _with_graph_breaks(parallelize_fn: Any) -> Any:
    """``parallelize_fn``, but compiled layers may break their graph around the attention.

    Recomputation cannot be part of a graph that breaks: torch would compile nothing of such a
    layer, without a word. So a layer is compiled within its recomputation.
    """

    @wraps(parallelize_fn)
    def parallelize(model: nn.Module, *, compile_config: Any, **rest: Any) -> nn.Module:
        model = parallelize_fn(model, compile_config=compile_config, **rest)
        if compile_config.enable and "model" in compile_config.components:
            for block in model.get_submodule("layers").children():
                if any(isinstance(module, NSAttention) for module in block.modules()):
                    layer = block
                    if isinstance(block, CheckpointWrapper):
                        block._compiled_call_impl = None
                        layer = block.get_submodule("_checkpoint_wrapped_module")
                    layer.compile(backend=compile_config.backend)  # In place of fullgraph=True.
        return model

    return parallelize
