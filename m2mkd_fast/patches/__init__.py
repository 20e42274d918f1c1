"""What :func:`m2mkd_fast.apply` can put into a model: one file for each kind of module that it replaces."""

from m2mkd_fast.patches.accelerate import accelerate
from m2mkd_fast.patches.biased_attention import biased_attention
from m2mkd_fast.patches.fastmoe import fastmoe_mlp
from m2mkd_fast.patches.mixture import mixture
from m2mkd_fast.patches.nac import nac_layer

__all__ = ["accelerate", "biased_attention", "fastmoe_mlp", "mixture", "nac_layer"]
