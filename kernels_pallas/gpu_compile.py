"""Compiles a jitted function for an NVIDIA GPU on a machine that has none, and says what came out.

XLA:GPU compiles without a device. It needs the wheels `jax-cuda13-plugin` and `jax-cuda13-pjrt` of the installed jax's own
version (the extra `gpu-compile`), a description of the target (`targets/*.txtpb`), and JAX_PLATFORMS=cpu before the first
use of jax, or the plugin looks for a driver. No driver, CUDA toolkit or cuDNN. CPU work goes on in the same process.

What it proves: lowering, shared memory within the target's limit, no register spills (each is a compile error here),
buffers aliased in place, copies, temporaries, what CUDA graphs capture. What does not fit is an error that names the kernel
and the figure. What it cannot: speed, numerics, races, and the
GEMM that autotuning would choose on the device (ADR 0007).

    compiled = Target("h200").compile(step, (params, state, inputs), donate_argnums=(1,))
    print(report(compiled))

Verified on jax 0.10.2, 0.11.2 and 0.12.0.1.
"""

import contextlib
import dataclasses
import importlib.util
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels_pallas import pallas_triton

TARGETS = pathlib.Path(__file__).parent / "targets"
"""One GpuTargetConfigProto a GPU model, as text (upstream: openxla/xla, xla/backends/gpu/target_config/specs)."""

FAIL_ON_SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
NAME_SPILLS = {"xla_gpu_ptx_compiler_extra_flags": "--warn-on-spills,-Werror"}
"""Makes a spill an error of the assembler, which names the kernel and the bytes; XLA's own does not."""


class GpuCompilerMissing(RuntimeError):
    """The PJRT plugin that compiles for a GPU is not installed, or jax was not told to stay on the CPU."""


class DoesNotFit(RuntimeError):
    """A kernel spills registers, or needs more shared memory than a block may have on the target."""


def _check_installed() -> None:
    version = jax.__version__
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise GpuCompilerMissing(
            "deviceless GPU compilation needs the plugin wheels of this jax: "
            f"pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} (extra 'gpu-compile')"
        )
    platforms = (jax.config.jax_platforms or "").split(",")  # pyright: ignore[reportAttributeAccessIssue]
    if "cpu" not in platforms:
        raise GpuCompilerMissing(
            f"deviceless GPU compilation needs JAX_PLATFORMS=cpu set before jax is used, it is {platforms}"
        )


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Keeps jax's compilation cache out: an executable of a device that is not there is written, but cannot be read back.

    Whether the cache is used is decided once, so both changes of the setting need a reset (public, jax.experimental).
    """
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


class Target:
    """A GPU model to compile for, and a one-axis mesh named "x" over `num_devices` of them."""

    def __init__(self, name: str = "h200", num_devices: int = 1, *, is_roomy: bool = False):
        """Reads `targets/{name}.txtpb`.

        Args:
          name: of the file.
          num_devices: of one host.
          is_roomy: with a thousand times the shared memory, to see what a kernel that does not fit asks for.

        Raises:
          GpuCompilerMissing: the compiler is not installed, or JAX_PLATFORMS was not set to "cpu".
        """
        _check_installed()
        self.name = name
        description = (TARGETS / f"{name}.txtpb").read_text()
        if is_roomy:
            description = re.sub(r"(shared_memory_per_block_optin: \d+)", r"\g<1>000", description)
        self.topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x1x{num_devices}"
        )
        self.mesh = Mesh(np.asarray(self.topology.devices), ("x",), axis_types=(AxisType.Auto,))

    @contextlib.contextmanager
    def as_default(self) -> Iterator[None]:
        """Makes this GPU what programs are compiled for, and keeps jax's compilation cache out."""
        # The default device tells both Pallas lowerings and `dispatch.current_platform` what is compiled for.
        with jax.default_device(self.topology.devices[0]), _no_persistent_cache():
            yield

    def compile(
        self,
        function: Callable,
        args: tuple,
        *,
        specs: PartitionSpec | tuple | None = None,
        mesh: Mesh | None = None,
        compiler_options: Mapping[str, str | bool] | None = None,
        **jit_kwargs: Any,
    ) -> jax.stages.Compiled:
        """Compiles `function(*args)`; of the arguments only shapes and dtypes are used.

        Args:
          function: what `jax.jit` takes.
          args: pytrees of arrays or ShapeDtypeStructs.
          specs: PartitionSpec of every argument, or a pytree prefix of `args` with one at each leaf; None replicates.
          mesh: a mesh over `self.topology.devices`; None takes the one-axis mesh.
          compiler_options: XLA options beside `FAIL_ON_SPILLS`.
          **jit_kwargs: for `jax.jit`, such as donate_argnums.

        Raises:
          DoesNotFit: names the kernel, what it needs and what there is.
        """
        mesh = self.mesh if mesh is None else mesh
        specs = PartitionSpec() if specs is None else specs
        spec_tree = jax.tree.map(
            lambda spec, subtree: jax.tree.map(lambda _: spec, subtree),
            specs if isinstance(specs, tuple) and not isinstance(specs, PartitionSpec) else tuple(specs for _ in args),
            args,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        shapes = jax.tree.map(
            lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), args, spec_tree
        )
        # A function that was traced before is only lowered here, in a context that may lack the filter.
        pallas_triton.silence_deprecation()
        with self.as_default():
            lowered = jax.jit(function, **jit_kwargs).lower(*shapes)
            options = {**FAIL_ON_SPILLS, **(compiler_options or {})}
            try:
                return lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                failure = str(error)
                if "register spilling" in failure:
                    raise DoesNotFit(f"{self.name}: {_spills(lowered, options)}") from error
                if "Shared memory size limit exceeded" not in failure:
                    raise
        raise DoesNotFit(f"{self.name}: {self._greediest_kernel(function, args, specs, mesh, jit_kwargs)} ({failure})")

    def _greediest_kernel(self, function: Callable, args: tuple, specs: Any, mesh: Mesh, jit_kwargs: dict[str, Any]) -> str:
        roomy = Target(self.name, len(self.topology.devices), is_roomy=True)
        mesh = Mesh(
            np.asarray(roomy.topology.devices).reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types
        )
        _, kernels = list_kernels(roomy, function, args, specs=specs, mesh=mesh, **jit_kwargs)
        most = max(kernels, key=lambda kernel: kernel.shared_memory_bytes)
        return f"{most.name} needs {most.shared_memory_bytes} bytes of shared memory"


def _spills(lowered: jax.stages.Lowered, options: Mapping[str, str | bool]) -> str:
    """Returns which kernel of a program that spills does, and how much."""
    try:
        lowered.compile(compiler_options={**options, **NAME_SPILLS})
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"in function '(\w+)', (\d+) bytes spill stores", str(error))
        return f"{found[1]} spills {found[2]} bytes of registers" if found else str(error)
    return "a kernel spills registers"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch of an executable."""

    name: str
    num_threads: int
    shared_memory_bytes: int
    is_captured: bool
    """In a CUDA graph."""


def list_kernels(
    target: Target, function: Callable, args: tuple, **kwargs: Any
) -> tuple[jax.stages.Compiled, tuple[Kernel, ...]]:
    """Compiles as `target.compile` does, and returns the executable with its kernels in launch order.

    XLA prints the list only into a dump, which makes the compilation about twice as slow.
    """
    with tempfile.TemporaryDirectory() as folder:
        # XLA leaves fewer than five kernels out of CUDA graphs; a whole step has more, one op alone may not.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_gpu_graph_min_graph_size": "1"}
        compiled = target.compile(function, args, compiler_options=options, **kwargs)
        # The second list is printed where a pass, such as the one that makes graphs, changed the first.
        paths = sorted(pathlib.Path(folder).glob("*thunk_sequence*.txt"), key=lambda path: "after" in path.name)
        return compiled, _parse_kernels(paths[-1].read_text())


def _parse_kernels(thunks: str) -> tuple[Kernel, ...]:
    """Reads lines such as "    002: kCustomKernel [...] name grid: [512, 8, 1] threads: [128, 1, 1]  shared_memory: 39168 bytes".

    What is captured stands indented under its kCommandBuffer.
    """
    pattern = re.compile(
        r"^( *)\d+: k\w*Kernel .*?\] (\S+) grid: \[.*?\] threads: \[(\d+), .*?shared_memory: (\d+) bytes", re.MULTILINE
    )
    return tuple(
        Kernel(name, int(threads), int(shared), is_captured=bool(indent))
        for indent, name, threads, shared in pattern.findall(thunks)
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What one executable needs and contains, per device."""

    argument_bytes: int
    aliased_bytes: int
    """Bytes of arguments that outputs reuse in place."""
    temporary_bytes: int
    copied_shapes: tuple[str, ...]
    """Shape ("bf16[64,8,64,128]") of each array that a copy instruction makes, fusions' roots included."""
    custom_calls: tuple[str, ...]
    """Targets of the custom calls, one entry each."""

    def num_copies_of(self, *arrays: object) -> int:
        """Returns how many copies have the shape and dtype of one of the arrays."""
        shapes = {_hlo_shape(array) for array in arrays}
        return sum(shape in shapes for shape in self.copied_shapes)


def _hlo_shape(array) -> str:
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int32": "s32", "int8": "s8", "uint16": "u16"}
    dtype = str(array.dtype)
    return f"{names.get(dtype, dtype)}[{','.join(map(str, array.shape))}]"


def report(compiled: jax.stages.Compiled) -> Report:
    """Returns the memory and the contents of an executable."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise ValueError(
            "this executable tells neither its memory nor its instructions; `Target.compile` makes ones that do"
        )
    copies = re.findall(r"= (\w+\[[\d,]*\])\S* (?:copy|copy-start)\(", text)
    return Report(
        argument_bytes=memory.argument_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        copied_shapes=tuple(copies),
        custom_calls=tuple(re.findall(r'custom_call_target="([^"]+)"', text)),
    )
