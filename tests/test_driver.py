"""The software Metal driver, as metal-cpp sees it: what works, and that each rule of Metal has a finding."""

import re
import subprocess
import sys
from ctypes import CDLL, c_char_p
from pathlib import Path

import pytest
from driver import build, control, selectors

pytestmark = pytest.mark.simulator

WORKS = [
    "device",
    "strings",
    "runs",
    "constants_and_offsets",
    "two_dispatches",
    "reverses",
    "completion_handler",
    "fresh_memory_is_nan",
    "library_from_data",
    "library_from_url",
    "source_with_error",
    "missing_constant",
    "wrong_constant_type",
    "no_constants",
    "unknown_function",
    "archive",
    "stream_runs",
    "exception_passes",
    "foundation_raises",
    "text_that_is_not_utf8",
    "million_messages",
]

# Scenario -> the rule that it breaks, and what the finding must say.
BROKEN = {
    "unbound_buffer": ("unbound-buffer", "kernel 'scale': nothing is bound to buffer 1, parameter 'output'"),
    "offset_beyond": ("offset", "offset 256 is beyond the 256 bytes of MTLBuffer"),
    "short_bytes": (
        "short-argument",
        "kernel 'scale': buffer 2, parameter 'params', holds 4 bytes, but 'constant Params&' reads 8",
    ),
    "offset_not_subtracted": ("not-a-buffer", "64 bytes behind the start of MTLBuffer"),
    "not_an_object": ("not-an-object", "is not a live MTLBuffer"),
    "not_a_buffer": ("not-an-object", "must be a live MTLBuffer"),
    "index_too_large": ("index", "index 31 is above 30 (kernel 'scale')"),
    "long_bytes": ("set-bytes", "4097 bytes at index 2, where 1 to 4096 bytes are allowed (kernel 'scale')"),
    "too_much_threadgroup_memory": ("threadgroup-memory", "32784 bytes exceed the limit of 32768 (kernel 'scale')"),
    "odd_threadgroup_memory": ("threadgroup-memory", "not a multiple of 16"),
    "static_and_dynamic": ("execution", "kernel 'reverse': threadgroup memory: 40960 bytes exceed the limit of 32768"),
    "too_many_threads": (
        "too-many-threads",
        "kernel 'scale': 96 threads per threadgroup",
    ),
    "empty_grid": ("empty-grid", "kernel 'scale': a grid of (1, 0, 1) threadgroups"),
    "partial_threadgroup": ("partial-threadgroup", "a grid of 50 threads in groups of 32"),
    "unbalanced_group": ("debug-group", "popDebugGroup without a pushDebugGroup"),
    "out_of_bounds": ("execution", "kernel 'scale': out of bounds: read of 4 bytes at byte 256 of buffer 'input'"),
    "no_pipeline": ("no-pipeline", "without a pipeline"),
    "use_after_end": ("after-end", "setBuffer:offset:atIndex: on MTLComputeCommandEncoder"),
    "never_ended": ("encoder-open", "is destroyed, but was never ended"),
    "commit_while_open": ("encoder-open", "is committed, but MTLComputeCommandEncoder"),
    "two_encoders": ("two-encoders", "still encodes to it"),
    "commit_twice": ("after-commit", "is committed a second time"),
    "wait_without_commit": ("deadlock", "was not committed"),
    "nil": ("nil", "'name' is sent to nil"),
    "unrecognised_selector": ("unrecognised-selector", "does not answer 'newFence'"),
    "empty_buffer": ("empty-buffer", "0 bytes"),
    "unaligned_no_copy": ("page-aligned", "16384"),
    "over_release": ("over-release", "MTLFunction"),
    "over_release_while_held": ("over-release", "MTLFunction"),
    "release_of_autoreleased": ("over-release", "it was autoreleased"),
    "use_after_release": ("use-after-release", "'length' is sent to MTLBuffer"),
    "dead_buffer_bound": ("use-after-release", "has been released"),
    "no_pool": ("no-pool", "NSString"),
    "left_over_argument": (
        "left-over",
        "kernel 'scale': buffer 1, parameter 'output', is left over",
    ),
    "torch_encoder_ended": ("shared-encoder", "endEncoding on torch's encoder"),
    "off_queue": ("off-queue", "commandEncoder()"),
    "nested_queue": ("queue-deadlock", "never returns"),
    "pipeline_of_another_gpu": ("device", "belongs to another GPU than the encoder"),
    "buffer_of_another_gpu": ("device", "belongs to another GPU than the encoder (kernel 'scale')"),
    "library_of_another_gpu": ("device", "is asked of another GPU than its library's"),
}

# Found in destructors, which must not throw.
NEVER_THROWN = {
    "never_ended",
    "unbalanced_group",
    "no_pool",
    "over_release",
    "over_release_while_held",
    "release_of_autoreleased",
}


class Client:
    """client.cpp, and the driver under it."""

    def __init__(self) -> None:
        self.driver = control.Driver(build.driver())
        self.kernels = build.kernels()
        self.library = CDLL(str(build.client()))
        self.library.client_run.restype = c_char_p

    def run(self, scenario: str, execution: str = "eager", mode: str = "record") -> str | None:
        """What the scenario threw."""
        self.driver.reset(self.kernels, execution, mode)
        error = self.library.client_run(scenario.encode())
        return error.decode() if error else None


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


@pytest.mark.parametrize("execution", ["eager", "lazy"])
@pytest.mark.parametrize("scenario", WORKS)
def test_works(client: Client, scenario: str, execution: str) -> None:
    before = len(client.driver.live())
    assert client.run(scenario, execution) is None
    assert client.driver.findings() == []
    assert client.driver.live()[before:] == []


def test_lazy_dispatches_run_when_someone_waits(client: Client) -> None:
    assert client.run("lazy_waits", "lazy") is None
    assert client.driver.findings() == []


@pytest.mark.parametrize("scenario", BROKEN)
def test_broken_rule_is_recorded(client: Client, scenario: str) -> None:
    rule, text = BROKEN[scenario]
    assert client.run(scenario) is None
    (finding,) = client.driver.findings()
    assert finding.endswith(f"[{rule}]") or rule == "execution"
    assert text in finding


@pytest.mark.parametrize("scenario", BROKEN)
def test_broken_rule_is_thrown(client: Client, scenario: str) -> None:
    rule, text = BROKEN[scenario]
    error = client.run(scenario, mode="throw")
    if scenario in NEVER_THROWN:
        assert error is None
    else:
        assert error is not None
        assert text in error
    assert any(finding.endswith(f"[{rule}]") or rule == "execution" for finding in client.driver.findings())


@pytest.mark.parametrize(("scenario", "leaked"), [("leak", "MTLFunction"), ("data_leak", "OS_dispatch_data")])
def test_leak_is_listed_with_its_creator(client: Client, scenario: str, leaked: str) -> None:
    before = set(client.driver.live())
    assert client.run(scenario) is None
    (leak,) = set(client.driver.live()) - before
    assert re.fullmatch(rf"{leaked} #\d+ \(1 reference\) from libdriver_client.so\+0x[0-9a-f]+.*", leak)


@pytest.mark.parametrize("scenario", ["dereference_handle", "write_behind_contents"])
def test_host_access_faults_at_once(client: Client, scenario: str) -> None:
    program = (
        "from ctypes import CDLL, RTLD_GLOBAL\n"
        f"driver = CDLL({str(build.driver())!r}, mode=RTLD_GLOBAL)\n"
        f"driver.mfa_driver_set_kernel_library({str(client.kernels)!r}.encode())\n"
        f"CDLL({str(build.client())!r}).client_run({scenario!r}.encode())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -11


def test_every_method_is_metal_cpps(client: Client) -> None:
    known = selectors.signatures(_metal_cpp())
    methods = client.driver.text("methods")
    assert len(methods) > 150
    for line in methods:
        match = re.fullmatch(r"[-+]\[\w+ (\S+)\] (\S+)", line)
        assert match, line
        assert match[1] in known, f"metal-cpp has no selector {match[1]}"
        # A few are inherited by name only (description); what metal-cpp sends must be what the method takes.
        assert not known[match[1]] or match[2] in known[match[1]], f"{line}, but metal-cpp sends {known[match[1]]}"


def _metal_cpp() -> Path:
    sys.path.insert(0, str(build.REPOSITORY / "cmake"))
    import find_metal_cpp  # type: ignore[import-not-found]

    return find_metal_cpp.find()
