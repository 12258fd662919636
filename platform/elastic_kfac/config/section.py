"""The base of every section of a configuration, and what its declarations are written with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Discriminator,
        Field,
        Tag,
        TypeAdapter,
        ValidationError,
        field_validator,
        model_validator,
    )
except ModuleNotFoundError as error:
    if error.name != "pydantic":
        raise
    if not TYPE_CHECKING:
        from elastic_kfac.config.stand_in import (
            BaseModel,
            ConfigDict,
            Discriminator,
            Field,
            Tag,
            TypeAdapter,
            ValidationError,
            field_validator,
            model_validator,
        )

__all__ = [
    "Discriminator",
    "Field",
    "Section",
    "Tag",
    "TypeAdapter",
    "ValidationError",
    "model_validator",
]

MOST = 2**63 - 1
"""The largest whole number that torch, NumPy and Arrow take."""


class Section(BaseModel):
    """A frozen section that rejects unknown keys; the docstring under a field is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _fits_into_64_bits(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > MOST:
            raise ValueError(f"whole numbers up to {MOST}")
        return value
