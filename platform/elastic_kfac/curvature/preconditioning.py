"""The forms of (F + γI)⁻¹, and the KL clip. Matrices are `[..., g, a]` (see factors.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.curvature.damping import least_damping, split_damping
from elastic_kfac.curvature.scalars import Number, divided, or_zero, root, within
from elastic_kfac.curvature.sides import Diagonal, LowRank, Side, Whole

_PIECE_ELEMENTS = 1 << 18
"""1 MiB of float32."""

_LEAST = "least"
"""Of a denominator, among what is held."""


class _Unprepared:
    """A form that needs nothing but its decomposition."""

    def prepared(
        self, held: Mapping[str, Tensor], damping: float, *, is_small: bool
    ) -> Mapping[str, Tensor]:
        """What is held."""
        return held


@dataclass(frozen=True)
class EigenForm:
    """Eigendecompositions of A and G: exact, `Q_G [(Q_Gᵀ D Q_A) / (d_G d_Aᵀ + γ)] Q_Aᵀ`.

    With `precompute` the quotient's denominator is inverted once per decomposition, which freezes γ.
    """

    A: Side
    G: Side
    precompute: bool

    @property
    def continues(self) -> bool:
        """Whether a decomposition depends on the last one."""
        return isinstance(self.A, LowRank) or isinstance(self.G, LowRank)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a decomposition, without groups."""
        sides = {"A": self.A, "G": self.G}
        vectors = {
            f"{name}_vectors": shape
            for name, side in sides.items()
            if (shape := side.vectors_shape) is not None
        }
        if self.precompute:
            return {**vectors, "E_reciprocal": (self.G.coordinates, self.A.coordinates)}
        values = {f"{name}_values": side.values_shape for name, side in sides.items()}
        return {**vectors, **values}

    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Eigendecompositions of the named factors; all of them with `precompute`."""
        result: dict[str, Tensor] = {}
        for name in names:
            side = self.A if name == "A" else self.G
            values, vectors = side.eigen(factors[name], last.get(f"{name}_vectors"))
            result[f"{name}_values"] = values
            if vectors is not None:
                result[f"{name}_vectors"] = vectors
        if self.precompute:
            pair = result.pop("A_values"), result.pop("G_values")
            product = self._denominator(*pair, damping, self._least(*pair))
            result["E_reciprocal"] = product.reciprocal_()
        return result

    def prepared(
        self, held: Mapping[str, Tensor], damping: float, *, is_small: bool
    ) -> Mapping[str, Tensor]:
        """With the denominator, of a small layer, or with the least that it may be."""
        if self.precompute:
            return held
        values = held["A_values"], held["G_values"]
        least = self._least(*values)
        if not is_small:
            return {**held, _LEAST: least}
        vectors = {name: tensor for name, tensor in held.items() if name.endswith("_vectors")}
        return {**vectors, "E_divisor": self._denominator(*values, damping, least)}

    def precondition(
        self,
        held: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        """P from D `[..., g, a]`, or from the `used` columns (rows) of D where the inputs of A (of G) are
        one-hot."""
        least = None
        if not self.precompute and "E_divisor" not in held:
            least = held.get(_LEAST)
            if least is None:
                least = self._least(held["A_values"], held["G_values"])
            else:
                held = {name: tensor for name, tensor in held.items() if name != _LEAST}
        pieces = _Pieces(self.A, self.G, held, gradient, used)
        return pieces.map(
            lambda a, g, held, part: self._of(a, g)._applied(held, part, damping, least)
        )

    def _of(self, a: Side, g: Side) -> Self:
        return self if a is self.A and g is self.G else replace(self, A=a, G=g)

    def _onto(self, held: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        """A gradient in coordinates of the eigenvectors."""
        x = _padded(gradient, self.A, self.G)
        if "G_vectors" in held:
            x = self.G.left_onto(held["G_vectors"], x)
        if "A_vectors" in held:
            x = self.A.right_onto(x, held["A_vectors"])
        return x

    def _back(self, held: Mapping[str, Tensor], x: Tensor, gradient: Tensor) -> Tensor:
        if "G_vectors" in held:
            x = self.G.left_back(held["G_vectors"], x)
        if "A_vectors" in held:
            x = self.A.right_back(x, held["A_vectors"])
        return _cropped(x, gradient)

    def _applied(
        self, held: Mapping[str, Tensor], gradient: Tensor, damping: float, least: Tensor | None
    ) -> Tensor:
        x = self._onto(held, gradient)
        if x is gradient:
            x = gradient.clone()
        if least is not None:
            x.div_(self._divisor(held, damping, least))
        elif "E_divisor" in held:
            x.div_(held["E_divisor"])
        else:
            x.mul_(held["E_reciprocal"])
        return self._back(held, x, gradient)

    def _divisor(self, held: Mapping[str, Tensor], damping: float, least: Tensor) -> Tensor:
        return self._denominator(held["A_values"], held["G_values"], damping, least)

    def _least(self, a_values: Tensor, g_values: Tensor) -> Tensor:
        largest = self.G.values(g_values).amax(-1) * self.A.values(a_values).amax(-1)
        return least_damping(largest, largest.dtype)[..., None, None]

    def _denominator(
        self, a_values: Tensor, g_values: Tensor, damping: float, least: Tensor
    ) -> Tensor:
        """`d_G d_Aᵀ + γ` `[..., g, a]`, with γ at least `least_damping`."""
        a, g = self.A.values(a_values), self.G.values(g_values)
        return (g.unsqueeze(-1) * a.unsqueeze(-2)).add_(least.clamp(min=damping))


@dataclass(frozen=True)
class CorrectedForm(EigenForm):
    """EK-FAC: `Q [(Qᵀ D) / (S + γ)]` in the eigenbasis Q = Q_A ⊗ Q_G, where S are second moments of
    per-sample gradients along Q instead of products of eigenvalues (George et al. 2018, as a running
    average over batches).

    S starts from the products and follows `_corrected`. With a new basis Q' it becomes the diagonal of
    `Q'ᵀ Q S Qᵀ Q'`: the same curvature, seen from there.
    """

    @property
    def continues(self) -> bool:
        return True

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        both = (self.G.padded, self.A.padded)
        return {**super().shapes, "E_moments": both, "E_mean": both}

    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Eigendecompositions of both factors, S and the mean gradient in their basis."""
        held = super().decompose(factors, names, damping, last)
        if "E_moments" not in last:
            a, g = self.A.values(held["A_values"]), self.G.values(held["G_values"])
            moments = g.unsqueeze(-1) * a.unsqueeze(-2)
            return {**held, "E_moments": moments, "E_mean": torch.zeros_like(moments)}
        moments, mean = last["E_moments"], last["E_mean"]
        if "A_vectors" in held:
            turn = held["A_vectors"].mT @ last["A_vectors"]
            moments, mean = self.A.right(moments, turn.square().mT), self.A.right(mean, turn.mT)
        if "G_vectors" in held:
            turn = held["G_vectors"].mT @ last["G_vectors"]
            moments, mean = self.G.left(turn.square(), moments), self.G.left(turn, mean)
        return {**held, "E_moments": self._pooled(held, moments), "E_mean": mean.contiguous()}

    def corrected(
        self,
        held: Mapping[str, Tensor],
        gradient: Tensor,
        samples: float,
        floor: float,
        decay: float,
    ) -> dict[str, Tensor]:
        """S and the mean gradient m after a batch with mean gradient D.

        With x = QᵀD, `S ← ρS + (1 − ρ) (B (1 + ρ)/2 (x − m)² + m² + floor·d_A)` and
        `m ← ρm + (1 − ρ) x`: a mean over B samples has a B-th of their variance, and the distance to the
        running mean `2/(1 + ρ)` times that. Without m, B x² would count the mean B times.

        Args:
            held: A decomposition.
            gradient: D, matrix layout.
            samples: B.
            floor: What is added to G before it is decomposed.
            decay: ρ.
        """
        x, mean = self._onto(held, gradient), held["E_mean"]
        # The first one is no distance from a mean.
        is_first = (mean == 0).all()
        new_mean = torch.where(is_first, x, decay * mean + (1.0 - decay) * x)
        apart = torch.where(is_first, 0.0, x - mean)
        squares = (0.5 * samples * (1.0 + decay)) * apart.square() + new_mean.square()
        squares = self._pooled(held, squares)
        if floor:
            squares = squares + floor * self.A.values(held["A_values"]).unsqueeze(-2)
        moments = decay * held["E_moments"] + (1.0 - decay) * squares
        usable = torch.isfinite(moments.sum())
        return {
            "E_moments": torch.where(usable, moments, held["E_moments"]),
            "E_mean": torch.where(usable, new_mean, mean),
        }

    def _pooled(self, held: Mapping[str, Tensor], moments: Tensor) -> Tensor:
        moments = self.A.pooled(moments, held["A_values"])
        return self.G.pooled(moments.mT, held["G_values"]).mT.contiguous()

    def prepared(
        self, held: Mapping[str, Tensor], damping: float, *, is_small: bool
    ) -> Mapping[str, Tensor]:
        """What is held: S is another in every step."""
        return held

    def precondition(
        self,
        held: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        moments = held["E_moments"]
        least = least_damping(moments.amax((-2, -1), keepdim=True), moments.dtype)
        needed = {n: t for n, t in held.items() if n.endswith("_vectors") or n == "E_moments"}
        return _Pieces(self.A, self.G, needed, gradient, used).map(
            lambda a, g, held, part: self._of(a, g)._applied(held, part, damping, least)
        )

    def _divisor(self, held: Mapping[str, Tensor], damping: float, least: Tensor) -> Tensor:
        return held["E_moments"] + least.clamp(min=damping)


@dataclass(frozen=True)
class InputForm(_Unprepared):
    """One side: `D (A + γI)⁻¹`, as if G were the identity (Benzing 2022)."""

    A: Side
    G: Side
    continues: ClassVar[bool] = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the inverse, without groups."""
        return {"A_inverse": self.A.shape}

    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The inverse of A; γ is at least `least_damping`."""
        typical = self.A.typical_eigenvalue(factors["A"])
        shift = least_damping(typical, typical.dtype).clamp(min=damping)
        return {"A_inverse": self.A.inverse(factors["A"], shift)}

    def precondition(
        self,
        held: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        """P from D `[..., g, a]`, or from its `used` columns; the damping is inside the inverse."""
        return _Pieces(self.A, self.G, held, gradient, used).map(self._applied)

    @staticmethod
    def _applied(a: Side, g: Side, held: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        return _cropped(a.right(_padded(gradient, a, g), held["A_inverse"]), gradient)


@dataclass(frozen=True)
class InverseForm(_Unprepared):
    """Inverses of the damped factors: `(G + γ_G I)⁻¹ D (A + γ_A I)⁻¹`, with `split_damping`."""

    A: Side
    G: Side
    split: str
    continues: ClassVar[bool] = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inverses, without groups."""
        return {"A_inverse": self.A.shape, "G_inverse": self.G.shape}

    def decompose(
        self,
        factors: Mapping[str, Tensor],
        names: tuple[str, ...],
        damping: float,
        last: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Inverses of the named factors; the split needs both."""
        pairs = ((self.A, factors["A"]), (self.G, factors["G"]))
        shifts = split_damping(
            [side.mean_eigenvalue(factor) for side, factor in pairs],
            [side.width for side, _ in pairs],
            lambda: [side.typical_eigenvalue(factor) for side, factor in pairs],
            damping,
            self.split,
            lambda: [side.smallest_eigenvalue(factor) for side, factor in pairs],
        )
        return {
            f"{name}_inverse": side.inverse(factor, shift)
            for name, (side, factor), shift in zip(("A", "G"), pairs, shifts, strict=True)
            if name in names
        }

    def precondition(
        self,
        held: Mapping[str, Tensor],
        gradient: Tensor,
        damping: float,
        used: Tensor | None = None,
    ) -> Tensor:
        """P from D `[..., g, a]`, or from its `used` columns or rows, as there; the damping is inside the
        inverses."""
        return _Pieces(self.A, self.G, held, gradient, used).map(self._applied)

    @staticmethod
    def _applied(a: Side, g: Side, held: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
        x = g.left(held["G_inverse"], _padded(gradient, a, g))
        return _cropped(a.right(x, held["A_inverse"]), gradient)


@dataclass(frozen=True)
class _Pieces:
    """A gradient with what it is preconditioned with, cut where its parts do not depend on each other.

    The parts of a large one then stay in a processor's cache from the first product to the last.
    """

    a: Side
    g: Side
    held: Mapping[str, Tensor]
    gradient: Tensor
    used: Tensor | None
    """Columns (rows) of the whole gradient that `gradient` has, where the inputs of A (of G) are
    one-hot."""

    def map(self, apply: Callable[[Side, Side, Mapping[str, Tensor], Tensor], Tensor]) -> Tensor:
        """`apply` to A, G, what is held and the gradient of every piece; the results in one matrix."""
        a, g, held, gradient = self.a, self.g, self.held, self.gradient
        if self.used is not None:
            is_column = isinstance(a, Diagonal) and a.is_whole
            untouched = "G_" if is_column else "A_"
            held = {
                name: tensor
                if name.startswith(untouched)
                else tensor.index_select(-1 if is_column or tensor.dim() == 1 else 0, self.used)
                for name, tensor in held.items()
            }
        axis = next((i for i, side in ((1, a), (0, g)) if not isinstance(side, Whole)), None)
        is_large = gradient.numel() > _PIECE_ELEMENTS and gradient.device.type == "cpu"
        if axis is None or not is_large or gradient.dim() > 2:
            return apply(a, g, held, gradient)
        side, other = (a, g) if axis else (g, a)
        result = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        for span in side.spans(_PIECE_ELEMENTS // other.padded, gradient.shape[axis]):
            part = gradient[:, span] if axis else gradient[span]
            piece = side.piece(span, part.shape[axis])
            mine = {
                name: side.part(tensor, span) if name.startswith("GA"[axis]) else tensor
                for name, tensor in held.items()
            }
            for name in ("E_reciprocal", "E_divisor", "E_moments"):
                if name in held:
                    mine[name] = held[name][:, span] if axis else held[name][span]
            sides = (piece, g) if axis else (a, piece)
            (result[:, span] if axis else result[span]).copy_(apply(*sides, mine, part))
        return result


def _padded(gradient: Tensor, a: Side, g: Side) -> Tensor:
    lacking = (a.padded - a.width, g.padded - g.width)
    return F.pad(gradient, (0, lacking[0], 0, lacking[1])) if any(lacking) else gradient


def _cropped(x: Tensor, gradient: Tensor) -> Tensor:
    if x.shape == gradient.shape:
        return x
    return x[..., : gradient.shape[-2], : gradient.shape[-1]]


def inner_products(preconditioned: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """`⟨P_i, D_i⟩` per layer as float64 `[layers]`, without a transfer to the host."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    products = [_product(p, d) for p, d in zip(preconditioned, gradients, strict=True)]
    return torch.stack(products).double()


def _product(p: Tensor, d: Tensor) -> Tensor:
    if p.dim() > 1 and not p.is_contiguous() and p.mT.is_contiguous() and d.mT.is_contiguous():
        p, d = p.mT, d.mT  # no copies
    return torch.dot(p.reshape(-1), d.reshape(-1))


def kl_clip_scale(divergence: Number, kl_clip: float) -> Number:
    """`ν = min(1, sqrt(κ / Σ_i lr_i² |⟨P_i, D_i⟩|))` (Ba et al. 2017).

    Args:
        divergence: The sum. Where it is not finite no step is known to keep the bound, and ν is 0.
        kl_clip: κ.
    """
    # Nothing to bound is nothing to scale, with κ = 0, too.
    return or_zero(within(root(divided(1.0, divergence) * (kl_clip or 1.0)), 0.0, 1.0))
