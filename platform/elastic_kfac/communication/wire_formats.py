"""Communication formats of numbers: fp32, bf16, scaled fp16, int8 per block, top-k.

A format encodes a flat vector as bytes. The number of bytes depends only on the number of elements, so
every rank can size its buffers. Sums are formed on decoded values (fp32, or fp64 for fp64 vectors),
never in the communication format.

Stochastic rounding is a function of (seed, step, stream, position) without generator state, so a resumed
or resized run rounds like an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elastic_kfac.errors import ConfigError

_BLOCK = 256
_EXPONENT_BIAS = 8


@dataclass(frozen=True)
class Rounding:
    """Position of a stochastic rounding in its random sequence; `stream` separates ranks and phases."""

    seed: int = 0
    step: int = 0
    stream: int = 0

    def uniform(self, count: int, device: torch.device) -> Tensor:
        """`count` numbers in [0, 1) by position (24 bits of a SplitMix64 hash), in fp32."""
        key = 0
        for part in (self.seed, self.step, self.stream):
            key = _mix_integer((key ^ part) + 0x9E3779B97F4A7C15)
        state = torch.arange(count, device=device, dtype=torch.int64)
        state = (state * _signed(0x9E3779B97F4A7C15)).add_(_signed(key))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ _shift(state, shift)) * _signed(factor)
        state = state ^ _shift(state, 31)
        return _shift(state, 40).to(torch.float32) * 2.0**-24


class WireFormat(ABC):
    """Encodes flat vectors as bytes."""

    name: ClassVar[str]
    lossy: ClassVar[bool] = False
    """Whether error feedback is worth its memory."""
    sparse: ClassVar[bool] = False
    """Whether sums of encoded vectors are denser than one vector: those are gathered, not reduced."""

    @abstractmethod
    def encoded_bytes(self, count: int) -> int:
        """Bytes for `count` elements."""

    @abstractmethod
    def encode(self, values: Tensor, rounding: Rounding) -> Tensor:
        """`values` [n] (fp32 or fp64) as uint8 [encoded_bytes(n)]."""

    @abstractmethod
    def decode(self, encoded: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """The encoded values [count]."""


class _Cast(WireFormat):
    """A plain cast to a floating-point type."""

    dtype: ClassVar[torch.dtype]

    def encoded_bytes(self, count: int) -> int:
        return self.dtype.itemsize * count

    def encode(self, values: Tensor, rounding: Rounding) -> Tensor:
        return _to_bytes(values.to(self.dtype))

    def decode(self, encoded: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return _from_bytes(encoded, self.dtype).to(dtype)


class FullPrecision(_Cast):
    """fp32: 4 bytes per element."""

    name = "fp32"
    dtype = torch.float32


class BrainFloat(_Cast):
    """bf16: 2 bytes per element, 8 bits of precision, the range of fp32."""

    name = "bf16"
    dtype = torch.bfloat16


class ScaledHalf(WireFormat):
    """fp16 with a power of two per block of 256: 2 bytes per element and 1 per block.

    Every block is scaled so that its largest magnitude lies in [2^14, 2^15): nothing overflows, and
    small gradients or factors do not underflow next to large ones in another block. Exponents are
    clamped to the range of one byte. Infinities and NaNs pass through.
    """

    name = "fp16"

    def encoded_bytes(self, count: int) -> int:
        return 2 * count + _num_blocks(count)

    def encode(self, values: Tensor, rounding: Rounding) -> Tensor:
        blocks = _in_blocks(values)
        finite = torch.where(torch.isfinite(blocks), blocks.abs(), 0)
        # frexp: magnitude = m 2^e with m in [1/2, 1)
        exponent = torch.frexp(finite.amax(dim=1)).exponent.clamp(-111, 128)
        scaled = torch.ldexp(blocks, (15 - exponent)[:, None]).to(torch.float16)
        halves = scaled.view(-1)[: values.numel()]
        return torch.cat([_to_bytes((exponent - _EXPONENT_BIAS).to(torch.int8)), _to_bytes(halves)])

    def decode(self, encoded: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        blocks = _num_blocks(count)
        exponent = _from_bytes(encoded[:blocks], torch.int8).to(torch.int32) + _EXPONENT_BIAS
        halves = _in_blocks(_from_bytes(encoded[blocks:], torch.float16).to(dtype))
        return torch.ldexp(halves, (exponent - 15)[:, None]).view(-1)[:count].to(dtype)


class StochasticInt8(WireFormat):
    """int8 with stochastic rounding, fp32 scale per block of 256: 1 byte each and 4 per block.

    q = floor(x / s + u) with s = max |x| / 127 and u uniform in [0, 1), so E[s q] = x.
    """

    name = "int8"
    lossy = True

    def encoded_bytes(self, count: int) -> int:
        return count + 4 * _num_blocks(count)

    def encode(self, values: Tensor, rounding: Rounding) -> Tensor:
        blocks = _in_blocks(values)
        scale = (blocks.abs().amax(dim=1) / 127.0).to(torch.float32)
        divisor = torch.where(scale > 0, scale, 1.0).to(values.dtype)
        uniform = rounding.uniform(blocks.numel(), values.device).view(blocks.shape)
        level = torch.floor(blocks / divisor[:, None] + uniform).clamp(-127, 127)
        # A non-finite element makes the scale non-finite: the whole block decodes to NaN.
        level = torch.nan_to_num(level, nan=1.0).to(torch.int8).view(-1)[: values.numel()]
        return torch.cat([_to_bytes(scale), _to_bytes(level)])

    def decode(self, encoded: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        split = 4 * _num_blocks(count)
        scale = _from_bytes(encoded[:split], torch.float32).to(dtype)
        level = _in_blocks(_from_bytes(encoded[split:], torch.int8).to(dtype))
        scale = torch.where(torch.isfinite(scale), scale, torch.nan)
        return (level * scale[:, None]).view(-1)[:count]


@dataclass(frozen=True)
class TopK(WireFormat):
    """The largest `ratio` of the elements by magnitude: 8 bytes (position, fp32) for each of them."""

    name = "topk"
    lossy = True
    sparse = True
    ratio: float = 0.01

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0:
            raise ConfigError(
                "the top-k ratio is out of range", given=self.ratio, allowed="0 < ratio <= 1"
            )

    def kept(self, count: int) -> int:
        """Elements sent of `count`: at least one."""
        return min(count, max(1, round(self.ratio * count)))

    def encoded_bytes(self, count: int) -> int:
        return 8 * self.kept(count)

    def encode(self, values: Tensor, rounding: Rounding) -> Tensor:
        magnitude = torch.nan_to_num(values.abs(), nan=float("inf"))
        positions = torch.topk(magnitude, self.kept(values.numel()), sorted=False).indices
        chosen = values[positions].to(torch.float32)
        return torch.cat([_to_bytes(positions.to(torch.int32)), _to_bytes(chosen)])

    def decode(self, encoded: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        split = 4 * self.kept(count)
        positions = _from_bytes(encoded[:split], torch.int32).to(torch.int64)
        values = torch.zeros(count, dtype=dtype, device=encoded.device)
        values[positions] = _from_bytes(encoded[split:], torch.float32).to(dtype)
        return values


WIRE_FORMATS = ("fp32", "bf16", "fp16", "int8", "topk")


def wire_format(name: str, *, topk_ratio: float = 0.01) -> WireFormat:
    """The format of this name.

    Raises:
        ConfigError: If there is no such format, or the ratio is out of range.
    """
    formats = (FullPrecision(), BrainFloat(), ScaledHalf(), StochasticInt8(), TopK(topk_ratio))
    for candidate in formats:
        if candidate.name == name:
            return candidate
    raise ConfigError("unknown communication format", given=name, allowed=", ".join(WIRE_FORMATS))


# -- bytes and blocks -----------------------------------------------------------------------------


def _to_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _from_bytes(encoded: Tensor, dtype: torch.dtype) -> Tensor:
    # A copy: a view needs the alignment of its dtype, which a slice of a byte buffer lacks.
    return encoded.clone().view(dtype)


def _num_blocks(count: int) -> int:
    return -(-count // _BLOCK)


def _in_blocks(values: Tensor) -> Tensor:
    blocks = _num_blocks(values.numel())
    if values.numel() == blocks * _BLOCK:
        return values.view(blocks, _BLOCK)
    padded = values.new_zeros(blocks * _BLOCK)
    padded[: values.numel()] = values
    return padded.view(blocks, _BLOCK)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift(values: Tensor, bits: int) -> Tensor:
    # Right shift of the 64 bits as an unsigned number; torch's keeps the sign.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix_integer(value: int) -> int:
    mask = (1 << 64) - 1
    value &= mask
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return value ^ (value >> 31)
