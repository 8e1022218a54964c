import importlib
import pkgutil

import torch

import dsv3.ops
from dsv3.bench.examples import calls
from dsv3.ops.operation import Operation


def test_every_operation_is_called_and_served():
    known = {
        value.name
        for module in pkgutil.iter_modules(dsv3.ops.__path__)
        if module.name != "kernels"
        for value in vars(importlib.import_module(f"dsv3.ops.{module.name}")).values()
        if isinstance(value, Operation)
    }
    called = set()
    for operation, arguments in calls(torch.device("cpu")):
        operation(*arguments)
        reasons = dict(operation.explain(*arguments))
        assert None in reasons.values()
        assert all(reasons[name] for name in reasons if name in ("triton", "scaled_mm", "deep_gemm", "grouped_mm"))
        called.add(operation.name)
    assert called == known
