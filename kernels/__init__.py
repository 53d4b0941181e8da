"""One operation, one file, or a file for each backend; here only their public names."""

from kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_reference, gated_linear_attention_step
from kernels.norm_rotary import norm_rotary, norm_rotary_reference
from kernels.probability_maps import probability_map
from kernels.relu_squared_feed_forward import relu_squared_feed_forward, relu_squared_feed_forward_reference
from kernels.residual_norm import residual_norm, residual_norm_reference
from kernels.short_convolution import short_convolution, short_convolution_reference
from kernels.softcapped_cross_entropy import softcapped_cross_entropy, softcapped_cross_entropy_reference
from kernels.splanifold import SplanifoldControls, splanifold, splanifold_reference
from kernels.symmetric_product import symmetric_product, symmetric_product_reference
from kernels.topological_attention import topological_attention, topological_attention_reference
from kernels.topological_attention_binned import topological_attention_binned

__all__ = ["SplanifoldControls", "gated_linear_attention", "gated_linear_attention_reference", "gated_linear_attention_step", "norm_rotary", "norm_rotary_reference",
           "probability_map", "relu_squared_feed_forward", "relu_squared_feed_forward_reference", "residual_norm", "residual_norm_reference", "short_convolution", "short_convolution_reference",
           "softcapped_cross_entropy", "softcapped_cross_entropy_reference", "splanifold", "splanifold_reference", "symmetric_product",
           "symmetric_product_reference", "topological_attention", "topological_attention_binned", "topological_attention_reference"]
