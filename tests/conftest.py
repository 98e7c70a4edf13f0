import pytest
import torch


def pytest_collection_modifyitems(items):
    """Leave out what needs GPUs that are not there, each by its name."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        needs = item.get_closest_marker("cuda")
        wanted = needs.args[0] if needs is not None and needs.args else int(needs is not None)
        if there < wanted:
            reason = f"not run, needs {wanted} CUDA device(s) and finds {there}: {item.name}"
            item.add_marker(pytest.mark.skip(reason=reason))
