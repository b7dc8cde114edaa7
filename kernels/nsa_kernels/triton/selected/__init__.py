"""The selected branch: attention to the tokens of the chosen blocks."""

from nsa_kernels.triton.selected.operator import selected_attention, selected_passes

__all__ = ["selected_attention", "selected_passes"]
