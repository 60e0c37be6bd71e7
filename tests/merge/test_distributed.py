"""What travels between processes, and by which backend: asked of torch's functions, which are replaced."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clipmerge import distributed
from clipmerge.errors import DeviceError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Two processes, of which this is the first; what torch was asked for."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name in ("init_process_group", "new_group", "barrier", "broadcast_object_list", "all_gather_object",
                 "gather_object", "all_reduce", "destroy_process_group"):  # fmt: skip

        def call(*given: Any, name: str = name, **options: Any) -> Any:
            made.append((name, given, options))
            return "the gloo group"

        monkeypatch.setattr(dist, name, call)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "_gloo", None)
    return made


def test_waiting_and_objects_never_meet_nccls_watchdog(calls: Any) -> None:
    """It ends a job after ten minutes; another process may decode images for hours (finding A4)."""
    cuda = torch.device("cuda", 0)
    distributed.start(cuda)
    assert [(name, given) for name, given, _ in calls] == [
        ("init_process_group", ("cpu:gloo,cuda:nccl",)),
        ("new_group", ()),
    ]
    assert calls[0][2]["device_id"] == cuda
    assert calls[1][2]["backend"] == "gloo"
    assert all(options["timeout"] >= timedelta(hours=1) for _, _, options in calls)
    calls.clear()
    distributed.barrier()
    distributed.broadcast_object(1)
    distributed.all_gather_object(1)
    distributed.gather_object(1)
    assert [options["group"] for _, _, options in calls] == ["the gloo group"] * 4


def test_gradients_outside_a_wrapper_are_averaged_in_one_message(calls: Any) -> None:
    """--chunk has 302 of them (finding C9)."""
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 1, 4)]
    for i, parameter in enumerate(parameters[:2]):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    distributed.average_gradients(parameters)
    (name, (flat,), _) = calls[0]
    assert (len(calls), name, len(flat)) == (1, "all_reduce", 4)
    # Nobody added the other process's: each is halved.
    assert [p.grad.tolist() for p in parameters[:2] if p.grad is not None] == [[0.5, 0.5, 0.5], [1.0]]
    assert parameters[2].grad is None


def test_a_lost_peer_is_one_sentence(calls: Any) -> None:
    with (
        pytest.raises(DeviceError, match="another process of this run stopped"),
        distributed.explain_lost_peer(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match="shape"), distributed.explain_lost_peer():
        raise RuntimeError("shape mismatch")
