"""elastic-kfac: second-order training on clusters that grow and shrink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["KFAC", "EnginePreconditioner", "KFACOptimizer", "__version__"]

if TYPE_CHECKING:
    from elastic_kfac.kfac.engine import EnginePreconditioner
    from elastic_kfac.kfac.kfac import KFAC
    from elastic_kfac.kfac.optimizer import KFACOptimizer


def __getattr__(name: str) -> Any:
    # Lazy, so that `elastic-kfac --help` and a mistyped option do not pay for importing torch.
    if name == "KFAC":
        from elastic_kfac.kfac.kfac import KFAC

        return KFAC
    if name == "EnginePreconditioner":
        from elastic_kfac.kfac.engine import EnginePreconditioner

        return EnginePreconditioner
    if name == "KFACOptimizer":
        from elastic_kfac.kfac.optimizer import KFACOptimizer

        return KFACOptimizer
    raise AttributeError(f"module 'elastic_kfac' has no attribute {name!r}")
