"""Blocks made of convolutions."""

from orbit.model.conv.block import ConvBlock
from orbit.model.conv.causal import CausalConv1d, Memory
from orbit.model.conv.depthwise import DepthwiseSeparableConv
from orbit.model.conv.residual import ResBasicBlock
from orbit.model.conv.tcn import TCN

__all__ = ["TCN", "CausalConv1d", "ConvBlock", "DepthwiseSeparableConv", "Memory", "ResBasicBlock"]
