"""The tests which prove that every kind of state survives a resize, one row per system with state.

A named test that is gone, renamed or without an assertion fails here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
COURSE = "distributed/training/test_course.py::test_three_two_three_ranks_equal_one_process"

ROWS: dict[str, dict[str, str]] = {
    "SGD": {
        "trajectory": "distributed/training/test_world_sizes.py"
        "::test_parked_at_three_and_resumed_at_two_then_one_equals_one_process",
        "in place": "distributed/training/test_in_place.py"
        "::test_departure_and_newcomer_end_as_one_process_without_a_step_redone",
    },
    "LARS": {"trajectory": f"{COURSE}[lars]"},
    "LAMB": {"trajectory": f"{COURSE}[lamb]"},
    "velocity and momentum rule": {
        "tied": f"{COURSE}[velocity]",
        "previous rate": f"{COURSE}[velocity-previous]",
    },
    "K-FAC (replicated factors)": {
        "state": "distributed/optimizers/test_kfac_ranks.py"
        "::test_state_saved_at_three_continues_at_two_as_if_nothing_happened",
        "living process": "distributed/optimizers/test_kfac_ranks.py"
        "::test_resize_in_a_living_process_equals_constant_world",
        "kill": "distributed/training/test_world_sizes.py"
        "::test_kill_then_restart_with_another_world_size_equals_one_process",
    },
    "Osawa pipeline": {
        "library": "distributed/optimizers/test_sharded_kfac.py"
        "::test_four_three_four_ranks_equal_constant_world",
        "trainer": f"{COURSE}[osawa]",
    },
    "adaptive refresh": {
        "trainer": "distributed/training/test_gradient_paths.py"
        "::test_four_three_four_ranks_equal_one_process_on_every_path",
    },
    "running mixup": {
        "dropped": "distributed/training/test_steps_apart.py"
        "::test_mixed_batches_are_dropped_by_a_restore",
        "resized": "distributed/training/test_steps_apart.py"
        "::test_four_ranks_that_stepped_apart_rejoin_and_go_on_as_three",
    },
    "DistNewton": {
        "merge and resize": "distributed/training/test_steps_apart.py"
        "::test_four_ranks_that_stepped_apart_rejoin_and_go_on_as_three",
        "asynchronous": "ray/test_async_newton.py"
        "::test_server_merges_what_is_fresh_and_drops_what_is_too_old",
    },
    "ABS": {"power": f"{COURSE}[abs]", "last layer": f"{COURSE}[abs-last-layer]"},
    "ABSA": {"attacks": f"{COURSE}[absa]", "K-FAC's eigenvalues": f"{COURSE}[absa-kfac]"},
    "compression": {
        "sum": "distributed/communication/test_compression_gloo.py"
        "::test_residual_sum_survives_leaving_ranks",
        "trainer": "distributed/training/test_gradient_paths.py"
        "::test_lossy_wires_stay_near_fp32_and_keep_their_residual_through_a_resize",
    },
    "loss scaler": {
        "restore": "unit/training/test_loop.py"
        "::test_half_precision_learns_and_resumes_in_the_same_bits",
    },
    "data": {
        "kill": "distributed/training/test_in_place.py"
        "::test_kill_of_one_of_three_survivors_go_on_and_end_as_one_process",
        "order": "unit/data/test_order.py::test_assignment_random_world_changes_every_sample_once",
    },
    "BN stats": {
        "weighted": "distributed/training/test_world_sizes.py"
        "::test_batch_norm_statistics_are_equal_on_all_ranks_and_weighted_by_samples",
        "synchronised": f"{COURSE}[sync-bn]",
    },
    "RNG": {
        "attacks": f"{COURSE}[robust]",
        "bits": "distributed/training/test_reproducible.py"
        "::test_final_state_has_the_same_bits_for_every_world_size_and_schedule",
    },
    "batch of the world": {
        "keep_local": "distributed/training/test_world_sizes.py"
        "::test_keep_local_shrinks_batch_and_rate_and_ramps_after_a_change",
        "policies": f"{COURSE}[gg]",
    },
}


def _tests_of(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return name.startswith("assert_")
    return isinstance(node, ast.Assert)


def _strings_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


@pytest.mark.parametrize("row", ROWS)
def test_row_names_tests_that_exist_and_assert(row: str) -> None:
    assert ROWS[row]
    for proof in ROWS[row].values():
        file, _, rest = proof.partition("::")
        name, _, case = rest.partition("[")
        path = TESTS / file
        assert path.is_file(), proof
        found = _tests_of(path)
        assert name in found, proof
        assert any(_asserts(node) for node in ast.walk(found[name])), proof
        if case:
            assert case.removesuffix("]") in _strings_of(path), proof


def test_every_row_of_the_table_is_there() -> None:
    table = {"SGD", "LARS", "LAMB", "K-FAC (replicated factors)", "Osawa pipeline", "data", "RNG"}
    table |= {"adaptive refresh", "running mixup", "DistNewton", "ABS", "ABSA", "compression"}
    table |= {"loss scaler", "BN stats"}
    assert table <= set(ROWS)
