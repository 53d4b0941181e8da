"""One operation, one file; here only their public names."""

from kernels.topological_attention import topological_attention, topological_attention_reference

__all__ = ["topological_attention", "topological_attention_reference"]
