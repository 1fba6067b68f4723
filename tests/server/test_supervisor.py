"""How many processes of each kind there are."""

import pytest

from embedserve.server import supervisor


@pytest.mark.parametrize(
    ("device", "without_gpu", "with_gpu"),
    [("auto", 1, 4), ("cpu", 1, 1), ("cpu,cpu", 1, 1), ("auto,cpu", 1, 4), ("cuda:0,cuda:1", 4, 4), ("cuda,cpu", 4, 4)],
)
def test_front_ends_are_many_beside_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, without_gpu: int, with_gpu: int
) -> None:
    monkeypatch.setattr("embedserve.server.supervisor.os.sched_getaffinity", lambda _: set(range(16)))
    for there, expected in [(False, without_gpu), (True, with_gpu)]:
        monkeypatch.setattr("embedserve.server.supervisor.os.path.exists", lambda _, there=there: there)
        assert supervisor._front_ends_for(device.split(",")) == expected
