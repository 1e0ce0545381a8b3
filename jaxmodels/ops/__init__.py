"""The mathematics: pure functions of arrays, no parameters, no Flax."""

from jaxmodels.ops import flow as flow
from jaxmodels.ops.attention import dot_product_attention as dot_product_attention
from jaxmodels.ops.cross_entropy import chunked_cross_entropy as chunked_cross_entropy
