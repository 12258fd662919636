"""The old name of `tasks.attacks`."""

from elastic_kfac.tasks.attacks import (
    Attack,
    AttackKind,
    adversarial_mask,
    mix_adversarial,
    perturbed,
)

__all__ = ["Attack", "AttackKind", "adversarial_mask", "mix_adversarial", "perturbed"]
