"""All that is used of cuda.bindings and cuda.core, as functions that raise; nothing else of them.
What makes tensor maps is in `maps`.

Streams, events and addresses are numbers; contexts, kernels and graphs are the bindings' own
objects. A test can put another implementation in the place of this module.

Explicit graph nodes come from the bindings: cuda.core's drop a kernel's cluster size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.runtime.errors import DeviceError, InputError, OutOfMemory

from . import dlpack
from .bindings import HELP, call, check, cuda, raise_for, text_of
from .maps import pixel_map as pixel_map
from .maps import tensor_map as tensor_map

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no order with the legacy default stream
_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING: cheaper events
_DEFAULT_SHARED = 48 * 1024  # more must be asked for, kernel by kernel
_PORTABLE_CLUSTER = 8
_PEAK_BYTES = 1 << 47
_DLPACK_CUDA = 2  # kDLCUDA


@dataclass(frozen=True, eq=False)
class Node:
    """A kernel launch in a graph; `arguments` are the 8-byte values of its parameters, as u64, and
    `maps` those after them, as `tensor_map` makes them. All blocks of one that goes `together` are
    at work at once, or the graph cannot be made."""

    kernel: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    arguments: np.ndarray[Any, Any]
    after: tuple[int, ...] = ()
    label: str = ""
    maps: tuple[Any, ...] = ()
    together: bool = False


@dataclass(frozen=True, eq=False)
class Graph:
    """An instantiated graph of nodes, in the order in which they were given.

    Of each node `made` is CUDA's, and `parameters` its structure, which points to `pointers`: the
    addresses of its arguments, and of `maps`.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Any, ...]
    made: tuple[Any, ...] = ()
    definition: Any = None
    executable: Any = None
    pointers: tuple[np.ndarray[Any, Any], ...] = ()
    maps: tuple[list[Any], ...] = ()


@dataclass(frozen=True, eq=False)
class View:
    """An array in a GPU's memory; `strides` are in elements, None if dense."""

    address: int
    device: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    readonly: bool
    owner: Any


# Devices


def driver_version() -> tuple[int, int]:
    """The CUDA version that the driver supports."""
    version = call("cuDriverGetVersion", "asking for the driver's version")
    return version // 1000, version % 1000 // 10


def device_count() -> int:
    driver = cuda()
    code, count = driver.cuDeviceGetCount()
    if code == driver.CUresult.CUDA_ERROR_NO_DEVICE:
        return 0
    raise_for(driver, code, "counting GPUs")
    return int(count)


def describe(number: int) -> tuple[str, int, int, int]:
    """Name, compute capability (major, minor) and bytes of memory of a GPU."""
    kinds = cuda().CUdevice_attribute
    doing = f"describing GPU {number}"
    device = call("cuDeviceGet", doing, number)
    name = text_of(call("cuDeviceGetName", doing, 128, device)).partition("\0")[0].strip()
    major, minor = (
        call("cuDeviceGetAttribute", doing, kind, device)
        for kind in (
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )
    )
    return name, int(major), int(minor), int(call("cuDeviceTotalMem", doing, device))


def multiprocessors(number: int) -> int | None:
    """How many multiprocessors a GPU has."""
    kind = cuda().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    doing = f"describing GPU {number}"
    device = call("cuDeviceGet", doing, number)
    return int(call("cuDeviceGetAttribute", doing, kind, device)) or None


def open_context(number: int) -> Any:
    """The GPU's primary context, which other libraries in this process use too."""
    device = call("cuDeviceGet", "opening a GPU", number)
    return call("cuDevicePrimaryCtxRetain", "opening a GPU", device)


def enter(context: Any) -> None:
    """Make the context this thread's until `leave`."""
    check(cuda().cuCtxPushCurrent(context)[0], "choosing a GPU")


def leave() -> None:
    check(cuda().cuCtxPopCurrent()[0], "leaving a GPU")


def current(context: Any) -> Callable[[], bool]:
    """What says whether the context is this thread's already, such as after PyTorch's calls."""
    ask = cuda().cuCtxGetCurrent

    def is_current() -> bool:
        code, found = ask()
        return not code and found == context

    return is_current


def close_context(number: int) -> None:
    device = call("cuDeviceGet", "closing a GPU", number)
    call("cuDevicePrimaryCtxRelease", "closing a GPU", device)


# Code


def load(code: bytes) -> Any:
    """A library of a cubin, or of PTX that ends with a zero byte."""
    return call("cuLibraryLoadData", "loading kernels", code, [], [], 0, [], [], 0)


def unload(library: Any) -> None:
    call("cuLibraryUnload", "unloading kernels", library)


def kernel(library: Any, name: str) -> Any:
    return call("cuLibraryGetKernel", f"looking for the kernel {name}", library, name.encode())


def parameter_sizes(kernel: Any, count: int) -> list[int] | None:
    """Bytes of a kernel's first parameters; None from drivers before CUDA 12.4, which can't say."""
    driver = cuda()
    sizes: list[int] = []
    while len(sizes) < count:
        try:
            code, _, size = driver.cuKernelGetParamInfo(kernel, len(sizes))
        except RuntimeError:
            return None
        if code == driver.CUresult.CUDA_ERROR_INVALID_VALUE:  # there is no such parameter
            return sizes
        raise_for(driver, code, "asking for a kernel's parameters")
        sizes.append(int(size))
    return sizes


# Memory


def allocate(size: int, purpose: str) -> int:
    if not 0 <= size < _PEAK_BYTES:
        raise OutOfMemory(f"{size} bytes for {purpose} are more than any GPU has")
    if size == 0:
        return 0
    return int(call("cuMemAlloc", f"allocating {size} bytes for {purpose}", size))


def free(address: int) -> None:
    """Free memory; waits until the GPU no longer uses it."""
    if address:
        call("cuMemFree", "freeing memory", address)


def pin(size: int, purpose: str) -> int:
    """The address of page-locked memory of this machine."""
    return int(call("cuMemHostAlloc", f"page-locking {size} bytes for {purpose}", size, 1))


def unpin(address: int) -> None:
    call("cuMemFreeHost", "freeing page-locked memory", address)


def copy_in(address: int, host: int, size: int, stream: int) -> None:
    check(cuda().cuMemcpyHtoDAsync(address, host, size, stream)[0], "copying to the GPU")


def copy_out(host: int, address: int, size: int, stream: int) -> None:
    check(cuda().cuMemcpyDtoHAsync(host, address, size, stream)[0], "copying from the GPU")


def copy(to: int, source: int, size: int, stream: int) -> None:
    check(cuda().cuMemcpyDtoDAsync(to, source, size, stream)[0], "copying on the GPU")


def clear(address: int, size: int, stream: int) -> None:
    call("cuMemsetD8Async", "clearing memory", address, 0, size, stream)


# Streams and events


def stream() -> int:
    return int(call("cuStreamCreate", "making a stream", _NON_BLOCKING))


def close_stream(stream: int) -> None:
    call("cuStreamDestroy", "closing a stream", stream)


def finish(stream: int) -> None:
    check(cuda().cuStreamSynchronize(stream)[0], "running on the GPU")


def event() -> int:
    return int(call("cuEventCreate", "making an event", _DISABLE_TIMING))


def timer() -> int:
    return int(call("cuEventCreate", "making an event", 0))


def elapsed(first: int, then: int) -> float:
    """Microseconds between two timers."""
    return 1e3 * float(call("cuEventElapsedTime", "reading a timer", first, then))


def close_event(event: int) -> None:
    call("cuEventDestroy", "closing an event", event)


def record(event: int, stream: int) -> None:
    check(cuda().cuEventRecord(event, stream)[0], "recording an event")


def wait(stream: int, event: int) -> None:
    check(cuda().cuStreamWaitEvent(stream, event, 0)[0], "waiting for an event")


def reached(event: int) -> bool:
    driver = cuda()
    (code,) = driver.cuEventQuery(event)
    if code == driver.CUresult.CUDA_ERROR_NOT_READY:
        return False
    raise_for(driver, code, "running on the GPU")
    return True


def finish_event(event: int) -> None:
    check(cuda().cuEventSynchronize(event)[0], "running on the GPU")


# Graphs


def graph(nodes: Sequence[Node], device: int) -> Graph:
    """The nodes as an instantiated graph. One for a single node too: it takes the processor less
    than half of what a launch by itself does, on an H100 1.6 us to 3.6."""
    definition = call("cuGraphCreate", "making a graph", 0)
    parameters, made, pointers = [], list[Any](), []
    try:
        for node in nodes:
            _allow(node, device)
            structure, addresses = _parameters(node)
            after = [made[i] for i in node.after]
            doing = f"adding the launch of {node.label}"
            made.append(
                call("cuGraphAddKernelNode", doing, definition, after, len(after), structure)
            )
            _set_attributes(made[-1], node)
            parameters.append(structure)
            pointers.append(addresses)
        executable = call("cuGraphInstantiate", "preparing a graph", definition, 0)
    except BaseException:
        call("cuGraphDestroy", "closing a graph", definition)
        raise
    return Graph(
        tuple(nodes), tuple(parameters), tuple(made), definition, executable, tuple(pointers),
        tuple(list(n.maps) for n in nodes),
    )  # fmt: skip


def update(
    graph: Graph, number: int, arguments: Mapping[int, int], maps: Mapping[int, Any]
) -> None:
    """Give a node other arguments and maps, by position; launches under way keep theirs."""
    node = graph.nodes[number]
    for position, value in arguments.items():
        node.arguments[position] = value
    for position, map in maps.items():  # not its bytes: others may have the same map
        graph.maps[number][position] = map
        graph.pointers[number][len(node.arguments) + position] = map.ctypes.data
    code = cuda().cuGraphExecKernelNodeSetParams(
        graph.executable, graph.made[number], graph.parameters[number]
    )[0]
    check(code, "changing a launch")


def launcher(graph: Graph) -> Callable[[int], None]:
    """What puts a graph on a stream."""
    driver, executable, latest, handle = cuda(), graph.executable, -1, None
    launch = driver.cuGraphLaunch

    def launched(stream: int) -> None:
        nonlocal latest, handle
        if stream != latest:  # the bindings would make their object each time
            latest, handle = stream, driver.CUstream(stream)
        code = launch(executable, handle)[0]
        if code:
            check(code, "launching a graph")

    return launched


def close_graph(graph: Graph) -> None:
    call("cuGraphExecDestroy", "closing a graph", graph.executable)
    call("cuGraphDestroy", "closing a graph", graph.definition)


def _parameters(node: Node) -> tuple[Any, Any]:
    """A node's structure, and the addresses of its arguments and maps, to which it points."""
    first, count = node.arguments.ctypes.data, len(node.arguments)
    places = [*range(first, first + 8 * count, 8), *(m.ctypes.data for m in node.maps)]
    addresses = np.array(places, np.uint64)
    found = cuda().CUDA_KERNEL_NODE_PARAMS()
    found.func = call("cuKernelGetFunction", f"preparing {node.label}", node.kernel)
    found.gridDimX, found.gridDimY, found.gridDimZ = node.grid
    found.blockDimX, found.blockDimY, found.blockDimZ = node.block
    found.sharedMemBytes = node.shared_bytes
    found.kernelParams = int(addresses.ctypes.data)
    return found, addresses


def _allow(node: Node, device: int) -> None:
    """Ask for shared memory and clusters beyond what every kernel may have."""
    kinds = cuda().CUfunction_attribute
    doing = f"preparing {node.label}"
    blocks = node.cluster[0] * node.cluster[1] * node.cluster[2]
    wanted = []
    if node.shared_bytes > _DEFAULT_SHARED:
        kind = kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        wanted.append((kind, node.shared_bytes))
    if blocks > _PORTABLE_CLUSTER:
        wanted.append((kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1))
    for kind, value in wanted:
        number = call("cuDeviceGet", doing, device)
        call("cuKernelSetAttribute", doing, kind, value, node.kernel, number)


def _set_attributes(made: Any, node: Node) -> None:
    """What a node is besides its structure: clusters, and whether its blocks go together."""
    driver = cuda()
    kinds, doing = driver.CUkernelNodeAttrID, f"preparing {node.label}"
    if node.cluster != (1, 1, 1):
        value = driver.CUkernelNodeAttrValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = node.cluster
        kind = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        call("cuGraphKernelNodeSetAttribute", doing, made, kind, value)
    if node.together:
        value = driver.CUkernelNodeAttrValue()
        value.cooperative = 1
        kind = kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        call("cuGraphKernelNodeSetAttribute", doing, made, kind, value)


# Arrays of other libraries


def view(value: Any, stream: int) -> View:
    """An array on a GPU by DLPack or the CUDA array interface, ready on the stream."""
    try:
        from cuda.core.utils import StridedMemoryView
    except ImportError as error:
        raise DeviceError(f"cuda-core is not there: {error}\n{HELP}") from None
    try:
        found = StridedMemoryView.from_any_interface(value, stream_ptr=stream)
    except Exception as error:  # of the array's library, or of cuda.core
        raise InputError(f"this array can't be read: {error}") from None
    if found.dtype is None:
        raise InputError("this array has no dtype that NumPy and ml_dtypes know")
    shape, strides = tuple(found.shape), found.strides
    return View(
        int(found.ptr), int(found.device_id), shape, None if strides is None else tuple(strides),
        np.dtype(found.dtype), bool(found.readonly), found,
    )  # fmt: skip


def export(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    number: int,
    owner: Any,
    max_version: tuple[int, int] | None,
) -> Any:
    """A DLPack capsule of memory of GPU `number`, which keeps `owner` alive."""
    return dlpack.capsule(
        address, shape, dtype, (_DLPACK_CUDA, number), owner, strides=strides,
        max_version=max_version,
    )  # fmt: skip
