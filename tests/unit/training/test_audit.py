"""The audit passes on a right ledger and names the step of a wrong one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from elastic_kfac.data.order import SampleOrder, id_hash
from elastic_kfac.runs.audit import audit_rows
from elastic_kfac.state.ledger import ROW, Ledger, Rows, from_parquet, to_parquet


class FixedOrder:
    num_samples = 10

    def ids(self, epoch: int, first_position: int, count: int) -> npt.NDArray[np.int64]:
        return SampleOrder(10, 0, epoch).ids(first_position, count)


def good_rows(steps: int = 7) -> Rows:
    """Batches of 4, 4, 2 per epoch."""
    ledger = Ledger()
    epoch = first = 0
    for step in range(1, steps + 1):
        count = min(4, 10 - first)
        ledger.append(
            step=step,
            epoch=epoch,
            first_position=first,
            num_samples=count,
            world_size=3 if step < 4 else 2,
            id_hash=id_hash(FixedOrder().ids(epoch, first, count)),
        )
        first += count
        if first == 10:
            epoch, first = epoch + 1, 0
    return ledger.value().tail


def test_right_ledger_of_an_unfinished_run_passes() -> None:
    report = audit_rows(good_rows(), FixedOrder())
    assert report.passed
    assert (report.steps, report.complete_epochs, report.samples) == (7, 2, 24)
    assert report.world_sizes == (3, 2)
    assert "3→2" in report.line()


def test_empty_ledger_passes() -> None:
    assert audit_rows(np.empty(0, ROW), FixedOrder()).passed


def test_lost_sample_is_found() -> None:
    rows = good_rows()
    ids = FixedOrder().ids(0, 4, 4)
    rows["id_hash"][1] = id_hash(ids[:3])
    report = audit_rows(rows, FixedOrder())
    assert report.problems[0].startswith("step 2: the samples at the loss were not those")
    assert len(report.problems) == 1


def test_repeated_sample_is_found() -> None:
    rows = good_rows()
    ids = FixedOrder().ids(0, 4, 4)
    rows["id_hash"][1] = id_hash(np.array([ids[0], ids[0], ids[2], ids[3]]))
    assert "step 2" in audit_rows(rows, FixedOrder()).line()


def test_samples_swapped_between_steps_are_found_in_both() -> None:
    rows = good_rows()
    first, second = FixedOrder().ids(0, 0, 4), FixedOrder().ids(0, 4, 4)
    rows["id_hash"][0] = id_hash(np.array([*first[:3], second[0]]))
    rows["id_hash"][1] = id_hash(np.array([first[3], *second[1:]]))
    report = audit_rows(rows, FixedOrder())
    assert [problem.split(":")[0] for problem in report.problems] == ["step 1", "step 2"]


def test_order_within_a_step_does_not_matter() -> None:
    rows = good_rows()
    rows["id_hash"][0] = id_hash(FixedOrder().ids(0, 0, 4)[::-1].copy())
    assert audit_rows(rows, FixedOrder()).passed


@pytest.mark.parametrize(
    ("column", "index", "value", "said"),
    [
        ("first_position", 1, 5, "samples lost"),
        ("first_position", 1, 3, "samples repeated"),
        ("epoch", 3, 0, "samples repeated"),
        ("epoch", 3, 2, "samples lost"),
        ("step", 2, 9, "step 9 follows step 2"),
        ("num_samples", 2, 3, "covers"),
        ("num_samples", 2, 1, "hash differs"),
        ("world_size", 0, 0, "0 workers"),
    ],
)
def test_one_wrong_number_is_found(column: str, index: int, value: int, said: str) -> None:
    rows = good_rows()
    rows[column][index] = value
    report = audit_rows(rows, FixedOrder())
    assert not report.passed
    assert any(said in problem for problem in report.problems), report.problems


def test_dropped_row_is_found() -> None:
    rows = np.delete(good_rows(), 3)
    assert "step 5 follows step 3" in audit_rows(rows, FixedOrder()).line()


def test_parquet_of_a_ledger_has_the_promised_types_and_comes_back() -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = good_rows()
    rows["id_hash"][0] = 2**64 - 1
    content = to_parquet(rows)
    schema = pq.read_schema(pa.BufferReader(content))
    assert {field.name: str(field.type) for field in schema} == {
        "step": "int64",
        "epoch": "int32",
        "first_position": "int64",
        "num_samples": "int32",
        "world_size": "int32",
        "id_hash": "uint64",
    }
    assert np.array_equal(from_parquet(content), rows)
