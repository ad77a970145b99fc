"""Which number type a device multiplies faster."""

import torch

from mmsr.system import number_types


def test_products_of_another_type_are_not_what_is_timed(monkeypatch):
    """A clock that goes on by a second a product in float32, and by three in bfloat16."""
    clock = [0.0]
    linear = number_types.linear

    def counted(a, b):
        clock[0] += 1.0 if a.dtype == torch.float32 else 3.0
        return linear(a, b)

    monkeypatch.setattr(number_types, "linear", counted)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert number_types.time_ratio(torch.bfloat16, torch.device("cpu")) == 3
