"""Scans that begin anew where a document does, against loops over float64."""
import pytest
import torch

from kernels.segmented_scan import running, starts_of, sums_after
from tests.errors import float_bound


def documents(R: int, n: int) -> torch.Tensor:
    """(R, n) numbers of documents, of a few tokens each."""
    return (torch.rand(R, n, generator=torch.Generator().manual_seed(n)) < 0.2).cumsum(-1)


@pytest.mark.parametrize("combine", [torch.add, torch.maximum])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("n", [1, 2, 13])
def test_running(combine, backward, with_documents, n):
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    doc = documents(3, n) if with_documents else torch.zeros(3, n, dtype=torch.int64)
    result = running(combine, x, starts_of(doc) if with_documents else None, backward)
    for row in range(3):
        for i in range(n):
            seen = [x[row, j] for j in (range(i, n) if backward else range(i + 1)) if doc[row, j] == doc[row, i]]
            expected = sum(seen) if combine is torch.add else max(seen)
            assert abs(result[row, i] - expected) <= (float_bound(len(seen), torch.float64) * sum(map(abs, seen))
                                                      if combine is torch.add else 0)


def test_running_keeps_no_rounding_of_another_document():
    x = torch.tensor([[1e16, 1.0, 1 / 3, 0.1]], dtype=torch.float64)
    assert running(torch.add, x, torch.tensor([[True, True, False, False]]))[0, 3] == 1.0 + 1 / 3 + 0.1


def test_sums_after_and_starts():
    assert sums_after(torch.tensor([1.0, 2.0, 4.0])).tolist() == [6, 4, 0]
    assert (
        starts_of(torch.tensor([3, 3, 5, 5, 3])).tolist() == [True, False, True, False, True]
        and starts_of(None) is None
    )
