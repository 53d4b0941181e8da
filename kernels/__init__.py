"""One operation, one file, or a file for each backend; here only their public names."""

from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_reference, gated_linear_attention_step
from kernels.probability_maps import probability_map
from kernels.residual_norm import residual_norm, residual_norm_reference
from kernels.short_convolution import short_convolution
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from kernels.topological_attention import topological_attention, topological_attention_reference
from kernels.topological_attention_binned import topological_attention_binned

__all__ = ["SplanifoldControls", "gated_linear_attention", "gated_linear_attention_reference", "gated_linear_attention_step", "probability_map", "residual_norm",
           "residual_norm_reference", "short_convolution", "splanifold", "splanifold_reference", "topological_attention", "topological_attention_binned",
           "topological_attention_reference"]
