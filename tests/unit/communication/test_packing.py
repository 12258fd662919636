from __future__ import annotations

import pytest
import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import (
    Bucketer,
    pack_triangle,
    triangle_size,
    unpack_triangle,
)
from elastic_kfac.errors import UsageError


def _symmetric(*shape: int) -> torch.Tensor:
    matrix = torch.randn(*shape, dtype=torch.float64)
    return matrix + matrix.transpose(-1, -2)


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_pack_triangle_places_row_column_at_the_published_position(n: int) -> None:
    matrix = _symmetric(n, n)
    packed = pack_triangle(matrix)
    assert packed.shape == (triangle_size(n),)
    for r in range(n):
        for c in range(r + 1):
            assert packed[r * (r + 1) // 2 + c] == matrix[r, c]


@pytest.mark.parametrize("shape", [(4, 4), (3, 5, 5), (2, 3, 7, 7), (2, 1, 1), (0, 4, 4)])
def test_unpack_triangle_of_packed_batches_is_the_identity(shape: tuple[int, ...]) -> None:
    matrix = _symmetric(*shape)
    again = unpack_triangle(pack_triangle(matrix), shape[-1])
    assert torch.equal(again, matrix)


def test_unpack_triangle_into_strided_and_from_strided() -> None:
    matrix = _symmetric(2, 6, 6)
    packed = pack_triangle(matrix.transpose(0, 1).contiguous().transpose(0, 1))
    target = torch.zeros(6, 2, 6, dtype=torch.float64).transpose(0, 1)
    unpack_triangle(packed, 6, out=target)
    assert torch.equal(target, matrix)


def test_wide_triangle_beyond_the_cache_is_packed_like_a_narrow_one() -> None:
    n = 2100
    matrix = torch.arange(n, dtype=torch.float32)
    matrix = matrix[:, None] * 3 + matrix[None, :] * 3
    packed = pack_triangle(matrix)
    row, column = torch.tril_indices(n, n)
    assert torch.equal(packed, matrix[row, column])
    assert torch.equal(unpack_triangle(packed, n), matrix)


def test_pack_triangle_keeps_the_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert pack_triangle(torch.eye(3, dtype=dtype)).dtype == dtype


def test_triangle_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="square"):
        pack_triangle(torch.ones(2, 3))
    with pytest.raises(UsageError, match="width 4"):
        unpack_triangle(torch.ones(9), 4)


def test_bucketer_of_one_rank_sends_and_counts_nothing() -> None:
    solo = Communicator.solo()
    bucketer = Bucketer(solo, tag="x")
    tensor = torch.ones(3)
    bucketer.all_reduce(tensor)
    bucketer.broadcast(tensor, 0)
    bucketer.flush().wait()
    assert tensor.tolist() == [1, 1, 1]
    assert solo.counters.snapshot() == {}
