"""Submodules of a layer: compressors, gates, norms, the MLP, rotary embedding and dropout."""
