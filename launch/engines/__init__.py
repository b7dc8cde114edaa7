"""What spreads the model over ranks and runs a step: FSDP2, Megatron-core, DeepSpeed."""
