"""Arrays to the device and back: nothing mixed up, nothing waited for, nothing left behind by what fails."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embedserve.server.staging import HostStaging, Staging, _places, staging_of

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda:0", marks=gpu)]


def doubled(there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() * 2 for name, tensor in there.items()}


@torch.inference_mode()
def double(staging: Staging, size: int, seed: int = 0) -> None:
    """Send two arrays of a size, and compare what comes back."""
    chance = np.random.default_rng(seed)
    numbers = chance.integers(0, 1000, (size, 3), dtype=np.int32)
    pixels = chance.integers(0, 256, size, dtype=np.uint8)
    pixels.flags.writeable = False
    with staging.run({"numbers": numbers, "pixels": pixels}, doubled) as host:
        assert list(host) == ["numbers", "pixels"]
        assert np.array_equal(host["numbers"], 2.0 * numbers)
        assert np.array_equal(host["pixels"], 2.0 * pixels)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_computed_comes_back(device: str) -> None:
    # Buffers grow, and hold what is left of larger batches.
    for size in (1, 100, 100_000, 3, 70_000, 300_000):
        double(staging_of(torch.device(device)), size, seed=size)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_do_not_disturb_each_other(device: str) -> None:
    staging = staging_of(torch.device(device))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda seed: double(staging, 1 + 997 * seed, seed), range(40)))


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_a_launch_that_fails_keeps_no_place(device: str) -> None:
    staging = staging_of(torch.device(device))

    def fails(there: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("no")

    # More often than there are places.
    for _ in range(2 * staging.concurrency):
        with pytest.raises(RuntimeError, match="no"), staging.run({"a": np.ones(1, np.int32)}, fails):
            pass
    double(staging, 10)


def test_on_the_cpu_nothing_is_copied() -> None:
    array, addresses = np.ones(5, np.int32), []

    def launch(there: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        addresses.append(there["a"].data_ptr())
        return there

    with HostStaging().run({"a": array}, launch) as host:
        assert host["a"].ctypes.data == array.ctypes.data == addresses[0]


def test_all_models_of_a_device_share_its_streams() -> None:
    assert staging_of(torch.device("cpu")) is staging_of(torch.device("cpu"))


@given(st.lists(st.integers(0, 5000), max_size=10))
def test_pieces_are_aligned_and_apart(sizes: list[int]) -> None:
    places, total = _places(sizes)
    assert [place.stop - place.start for place in places] == sizes
    assert all(place.start % 256 == 0 for place in places)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(places))
    assert total == max((place.stop for place in places), default=0)


@pytest.mark.parametrize("device", [pytest.param("cuda:0", marks=gpu)])
@torch.inference_mode()
def test_a_batch_is_launched_while_the_one_before_it_runs(device: str) -> None:
    staging = staging_of(torch.device(device))
    one = {"a": np.ones(1, np.int32)}
    launched = threading.Event()
    double(staging, 10)

    def slow(there: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
        launched.set()
        return there

    @torch.inference_mode()
    def run() -> None:
        with staging.run(one, slow):
            pass

    first = threading.Thread(target=run)
    first.start()
    assert launched.wait(30)

    def second(there: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert first.is_alive()
        return there

    with staging.run(one, second) as host:
        assert host["a"].tolist() == [1]
    first.join(30)


USES_THE_SECOND = """
import numpy, torch
from embedserve.server.staging import staging_of
with torch.inference_mode(), staging_of(torch.device("cuda:1")).run({"a": numpy.ones(1, "i4")}, lambda there: there):
    pass
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_gpu_takes_no_memory_of_another() -> None:
    command, environment = [sys.executable, "-c", USES_THE_SECOND], {**os.environ, "PYTHONPATH": ".typing"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
