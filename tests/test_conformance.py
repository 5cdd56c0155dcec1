"""Every wrapper of kernels/ptx/ on this GPU, against NumPy: the other half of the fixtures."""

from __future__ import annotations

import pytest
from conformance import on_gpu
from conformance.case import Case, compare
from conformance.cases import ALL

from cuattn import _device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", ALL, ids=str)
def test_instruction(case: Case) -> None:
    arch = _device.describe(_device.current()).arch
    if arch != "sm_90a":
        pytest.skip(f"the GPU is {arch}; these instructions are Hopper's, sm_90a")
    assert case.expected is not None
    compare(case, on_gpu.run(case), case.expected(case.inputs))
