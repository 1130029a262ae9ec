"""The adapter for the standard's own runner: `onnx.backend.test.BackendTest(Backend, __name__)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend as BaseBackend
from onnx.backend.base import BackendRep as BaseRep

from .errors import OnnxError
from .importing import Imported, import_model
from .reading import HELD

DEVICES = {"CPU": "cpu", "EMULATOR": "emulator"}


class BackendRep(BaseRep):
    """A model that is ready to run.

    Inputs that must be known while compiling (a shape, axes) are fixed to the values of a call; a
    call with other values compiles again.
    """

    def __init__(self, model: onnx.ModelProto, device: str, imported: Imported | None) -> None:
        self.model, self.device = model, device
        self.fixed: set[str] = set()
        self._pipes: dict[tuple[bytes, ...], tuple[Imported, Any]] = {}
        held = {t.name for t in model.graph.initializer}
        self.names = [i.name for i in model.graph.input if i.name not in held]
        if imported is not None:
            self._pipes[()] = (imported, _compiled(imported, device))

    def run(self, inputs: Any, **kwargs: Any) -> tuple[np.ndarray[Any, Any], ...]:
        """The results, in the model's order, for inputs in its order or by name."""
        if isinstance(inputs, Mapping):
            given = dict(inputs)
        else:
            items: Sequence[Any] = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            given = dict(zip(self.names, items, strict=False))
        imported, pipe = self._pipe(given)
        found = pipe(**{new: held(given[old]) for old, new in imported.inputs.items()})
        results = found if isinstance(found, tuple) else (found,)
        parts = [np.asarray(r) for r, _ in zip(results, imported.results, strict=False)]
        for name, (axis, place) in imported.counts.items():
            at = list(imported.results).index(name)
            parts[at] = parts[at].take(np.arange(int(results[place])), axis)
        kinds = [o.type.tensor_type.elem_type for o in self.model.graph.output]
        return tuple(
            r.astype(HELD[kind][1]) if kind in HELD else r
            for r, kind in zip(parts, kinds, strict=True)
        )

    def _pipe(self, given: Mapping[str, Any]) -> tuple[Imported, Any]:
        while True:
            fixed = {n: held(given[n]) for n in sorted(self.fixed)}
            key = tuple(a.tobytes() for a in fixed.values())
            if key not in self._pipes:
                try:
                    imported = import_model(self.model, fixed=fixed)
                except OnnxError as error:
                    if not self._fix(error):
                        raise
                    continue
                self._pipes[key] = (imported, _compiled(imported, self.device))
            return self._pipes[key]

    def _fix(self, error: OnnxError) -> bool:
        """Whether fixing more inputs may remove what is in the way."""
        more = {i for p in error.problems for i in p.inputs} - self.fixed
        if any(not p.inputs for p in error.problems):
            return False
        self.fixed |= more
        return bool(more)


def held(given: Any) -> np.ndarray[Any, Any]:
    """An array; of an element type that the language lacks, in the dtype that holds it."""
    array = np.asarray(given)
    for dtype, kind in HELD.values():
        if array.dtype == kind:
            return array.astype(np.float32 if dtype.is_float else np.int32).astype(dtype.numpy)
    return array


class Backend(BaseBackend):
    """Runs models compiled by stagefuse: "CPU" as native code, "EMULATOR" as PTX, emulated."""

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device.partition(":")[0] in DEVICES

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether the model can be imported, perhaps with some inputs fixed."""
        if not cls.supports_device(device):
            return False
        try:
            import_model(model)
        except OnnxError as error:
            return all(p.inputs for p in error.problems)
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """The compiled model. Raises OnnxError, ValueError for an unknown device."""
        target = _target(device)
        onnx.checker.check_model(model)
        try:
            imported = import_model(model)
        except OnnxError as error:
            if not all(p.inputs for p in error.problems):
                raise
            return BackendRep(model, target, None)
        return BackendRep(model, target, imported)

    @classmethod
    def run_node(
        cls, node: onnx.NodeProto, inputs: Any, device: str = "CPU", outputs_info: Any = None,
        **kwargs: Any,
    ) -> tuple[np.ndarray[Any, Any], ...]:
        """The results of one node alone. Raises OnnxError, ValueError for an unknown device."""
        target = _target(device)
        super().run_node(node, inputs, device, outputs_info, **kwargs)  # checks the node
        arrays = [np.asarray(x) for x in inputs]
        helper = onnx.helper
        infos = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip((i for i in node.input if i), arrays, strict=True)
        ]
        results = [helper.make_empty_tensor_value_info(o) for o in node.output if o]
        version = kwargs.get("opset_version", onnx.defs.onnx_opset_version())
        graph = helper.make_graph([node], "node", infos, results)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(node.domain, version)])
        return BackendRep(model, target, None).run(arrays)


def _target(device: str) -> str:
    """The compiler's name of a device. Raises ValueError."""
    if not Backend.supports_device(device):
        raise ValueError(f"there is no device {device!r}; there is {', '.join(DEVICES)}")
    return DEVICES[device.partition(":")[0]]


def _compiled(imported: Imported, device: str) -> Any:
    import stagefuse

    weights = {imported.weights: imported.arrays} if imported.arrays else None
    return stagefuse.compile(imported.text, device=device, weights=weights)
