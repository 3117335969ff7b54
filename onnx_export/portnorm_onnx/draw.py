"""A graph as a picture: a box for each node, with its constants in it, and the body of a loop as a box with its own nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy
import onnx
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

from portnorm.files import written_whole
from portnorm_onnx.layout import Box, Edge, place
from portnorm_onnx.report import count_nodes
from portnorm_onnx.storage import read_model

_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "products": ("#dbe8ff", ("MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulNBits", "QGemm", "Einsum")),
    "normalization": (
        "#d8f3dc",
        ("LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "ReduceMean"),
    ),
    "functions": ("#fff1c9", ("Sigmoid", "Tanh", "Relu", "HardSigmoid", "Softmax", "Exp", "Erf", "Sqrt", "Softplus")),
    "loops and branches": ("#f3e3ff", ("Scan", "Loop", "If", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")),
    "others": ("#f1f3f5", ()),
}
"""What the colours mean, and the operators of each."""

_BIG, _SMALL, _LINE, _PAD = 13.0, 10.5, 14.0, 8.0
_STYLE = f"""
text {{ font-family: system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; font-size: {_SMALL}px; fill: #495057; }}
.op {{ font-size: {_BIG}px; font-weight: 600; fill: #212529; }} .title {{ font-size: 15px; font-weight: 600; fill: #212529; }}
.out {{ fill: #1864ab; }} .end {{ fill: #212529; font-weight: 600; }}
.line {{ fill: none; stroke: #868e96; stroke-width: 1.3; }} .box {{ stroke: #adb5bd; }}
.loop {{ fill: #faf5ff; stroke: #b197fc; stroke-width: 1.5; }}
.pill {{ fill: #ffffff; stroke: #495057; }} .state {{ stroke: #7048e8; stroke-dasharray: 4 2; }}
"""


def draw(path: str | os.PathLike[str], picture: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the graph of an .onnx file as an SVG file; returns its size and how many nodes it has.

    Weights and constants stand in the boxes of the nodes that take them, shapes below what gives them. A model-local function is drawn as
    what it computes. Raises `ExportError` where the file holds no graph, and `PortnormError` where the picture cannot be written.
    """
    proto = read_model(path)
    text, (width, height) = svg(proto, Path(path).name)
    with written_whole(picture) as file:
        file.write(text.encode())
    nodes, bodies = count_nodes(proto)
    return {"picture": os.fspath(picture), "nodes": nodes, "body_nodes": list(bodies), "width": width, "height": height}


def svg(proto: onnx.ModelProto, name: str) -> tuple[str, tuple[int, int]]:
    """The picture as text, and its width and height."""
    proto = _with_shapes(inline_local_functions(proto) if proto.functions else proto)
    whole = _Drawn(proto.graph, {})
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), "?")
    nodes, bodies = count_nodes(proto)
    inside = "".join(f" + {n} in a loop" for n in bodies)
    width, height = max(whole.width, 560.0) + 40, whole.height + 110
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0.5 L7.5,4 L0,7.5 z" fill="#868e96"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(20, 28, name, "title"),
        _text(20, 45, f"opset {opset}, {nodes} nodes{inside}"),
        *whole.written(20 + (width - 40 - whole.width) / 2, 65),
        *_legend(20, height - 18),
        "</svg>",
    ]
    return "\n".join(parts) + "\n", (round(width), round(height))


def _with_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With the shapes that can be known; a graph that is not quite right is drawn without."""
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return proto


def _legend(x: float, y: float) -> Iterator[str]:
    for kind, (color, _) in _KINDS.items():
        yield f'<rect class="box" x="{x:.1f}" y="{y - 10:.1f}" width="14" height="12" rx="3" fill="{color}"/>'
        yield _text(x + 20, y, kind)
        x += 36 + _width(kind, _SMALL)


# -- what stands in a box ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Item:
    """A node, or an input or output of a graph, with its place."""

    box: Box
    title: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    """Text and its class."""
    kind: str = ""
    bodies: list[tuple[str, _Drawn]] = field(default_factory=list)
    said: str = ""
    """The node's name, shown by a pointer that rests on it."""


class _Drawn:
    """A graph that is laid out: the items in it, and the lines between them."""

    def __init__(self, graph: onnx.GraphProto, outer: Mapping[str, str], roles: Mapping[str, str] | None = None):
        inside, self.roles = roles is not None, roles or {}
        self.shapes = {v.name: _shape(v) for v in (*graph.input, *graph.value_info, *graph.output)}
        self.constants = {**outer, **{t.name: _constant(t.name, t) for t in graph.initializer}}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = _constant_of(node)
        self.items: list[_Item] = []
        self.made: dict[str, tuple[Box, int]] = {}
        self.edges: list[Edge] = []
        self.inputs = [self._end(v.name, given=True) for v in graph.input if v.name not in self.constants]
        for node in graph.node:
            if node.op_type != "Constant":
                self._node(node)
        self.outputs = [self._end(v.name, given=False) for v in graph.output]
        ends = ([item.box for item in some] if inside else [] for some in (self.inputs, self.outputs))
        placed = place([item.box for item in self.items], self.edges, *ends)
        self.width, self.height, self.lines = placed.width, placed.height, placed.lines

    def _end(self, name: str, *, given: bool) -> _Item:
        role, shape = self.roles.get(name, ""), self.shapes.get(name, "")
        if not given and name in self.constants:
            shape = self.constants[name]
        lines = [(line, "") for line in (role, shape) if line]
        width = max(_width(name, _SMALL, bold=True), *(_width(line, _SMALL) for line, _ in lines), 30.0) + 24
        box = Box(width, 10 + _LINE * (1 + len(lines)), [width / 2], [width / 2])
        item = _Item(box, name, lines, "state" if role.startswith("state") else "end")
        self.items.append(item)
        if given:
            self.made[name] = box, 0
        elif name in self.made:
            self.edges.append(Edge(*self.made[name], box, 0))
        return item

    def _node(self, node: onnx.NodeProto) -> None:
        taken = [name for name in node.input if name and name not in self.constants and name in self.made]
        lines = [(f"{_formal(node, k)}{self.constants[name]}", "") for k, name in enumerate(node.input) if name in self.constants]
        lines += [(f"from outside: {name}", "") for name in node.input if name and name not in self.constants and name not in self.made]
        if said := _attributes(node):
            lines.append((said, ""))
        lines += [(f"→ {shape}", "out") for shape in self._given(node)]
        bodies = list(self._bodies(node))
        width = max(_width(node.op_type, _BIG, bold=True), *(_width(line, _SMALL) for line, _ in lines), 44.0) + 2 * _PAD
        height = 2 * _PAD + _BIG + 2 + _LINE * len(lines)
        box = Box(width, height)
        item = _Item(box, node.op_type, lines, _kind(node.op_type), bodies, node.name)
        if bodies:
            box.width = max(width, sum(body.width + 2 * _PAD for _, body in bodies) + 2 * _PAD)
            box.height = height + max(body.height for _, body in bodies) + _LINE + 2 * _PAD
        box.inputs = [box.width * (k + 1) / (len(taken) + 1) for k in range(len(taken))]
        box.outputs = [box.width * (k + 1) / (len(node.output) + 1) for k in range(len(node.output))]
        if node.op_type in ("Scan", "Loop"):
            _ports(node, item, [k for k, name in enumerate(node.input) if name in taken])
        captured = [name for name in _captured(node) if name in self.made and name not in self.constants]
        box.inputs += [box.width - _PAD * (k + 1) for k in range(len(captured))]
        self.items.append(item)
        for k, name in enumerate((*taken, *captured)):
            self.edges.append(Edge(*self.made[name], box, k))
        for k, name in enumerate(node.output):
            if name:
                self.made[name] = box, k

    def _given(self, node: onnx.NodeProto) -> list[str]:
        """The shapes of what a node gives; those that are alike once."""
        shapes = [self.shapes.get(name, "") for name in node.output if name]
        found = [shape for shape in dict.fromkeys(shapes) if shape]
        return [f"{shapes.count(shape)} × ({shape})" if shapes.count(shape) > 1 else shape for shape in found]

    def _bodies(self, node: onnx.NodeProto) -> Iterator[tuple[str, _Drawn]]:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                yield a.name.replace("_", " "), _Drawn(a.g, self.constants, _roles(node, a.g))

    def written(self, x: float, y: float) -> Iterator[str]:
        """The elements of the picture, from this corner."""
        for item in self.items:
            if item.bodies:
                yield from self._written_item(item, x, y)
        for line in self.lines:
            yield _path([(x + a, y + top, y + bottom) for a, top, bottom in line])
        for item in self.items:
            if not item.bodies:
                yield from self._written_item(item, x, y)

    def _written_item(self, item: _Item, x: float, y: float) -> Iterator[str]:
        left, top, box = x + item.box.x, y + item.box.y, item.box
        rect = f'x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
        middle = left + box.width / 2
        yield f"<g><title>{escape(item.said or item.title)}</title>"
        if item.kind in ("end", "state"):
            yield f'<rect class="pill{" state" if item.kind == "state" else ""}" {rect} rx="{min(14.0, box.height / 2):.1f}"/>'
            yield _text(middle, top + 15, item.title, "end", "middle")
            for k, (line, _) in enumerate(item.lines):
                yield _text(middle, top + 15 + _LINE * (k + 1), line, "", "middle")
        else:
            fill = "" if item.bodies else f' fill="{_KINDS[item.kind][0]}"'
            yield f'<rect class="{"loop" if item.bodies else "box"}" {rect} rx="6"{fill}/>'
            at, anchor = (left + 2 * _PAD, "") if item.bodies else (middle, "middle")
            yield _text(at, top + _PAD + _BIG - 2, item.title, "op", anchor)
            for k, (line, kind) in enumerate(item.lines):
                yield _text(at, top + _PAD + _BIG + _LINE * (k + 1), line, kind, anchor)
            for (x_inside, y_inside), (name, body) in zip(_corners(item), item.bodies, strict=True):
                if len(item.bodies) > 1:
                    yield _text(left + x_inside, top + y_inside - 8, name)
                yield from body.written(left + x_inside, top + y_inside)
        yield "</g>"


def _corners(item: _Item) -> list[tuple[float, float]]:
    """Where the bodies begin in the box, beside each other in the middle of what room there is."""
    y = 2 * _PAD + _BIG + 2 + _LINE * (len(item.lines) + 1)
    spare = (item.box.width - 2 * _PAD - sum(body.width + 2 * _PAD for _, body in item.bodies)) / max(1, len(item.bodies))
    found, x = [], _PAD
    for _, body in item.bodies:
        found.append((x + _PAD + spare / 2, y))
        x += body.width + 2 * _PAD + spare
    return found


def _captured(node: onnx.NodeProto) -> list[str]:
    """What the bodies of a node read of the graph around it."""
    found: dict[str, None] = {}
    for a in node.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            own = {v.name for v in a.g.input} | {t.name for t in a.g.initializer} | {name for n in a.g.node for name in n.output}
            read = [name for n in a.g.node for name in (*n.input, *_captured(n))] + [v.name for v in a.g.output]
            found |= dict.fromkeys(name for name in read if name and name not in own)
    return list(found)


def _ports(node: onnx.NodeProto, item: _Item, taken: Sequence[int]) -> None:
    """Let the lines of a loop come to the inputs of its body, and from its outputs."""
    (x, y), (_, body) = _corners(item)[0], item.bodies[0]
    count, box = {"Scan": 0, "Loop": 1}[node.op_type], item.box
    for k, place_of in enumerate(taken):
        end = body.inputs[place_of].box
        box.inputs[k], box.reach[k] = x + end.x + end.width / 2, y + end.y
    for k in range(len(node.output)):
        end = body.outputs[k + count].box
        box.outputs[k], box.leave[k] = x + end.x + end.width / 2, box.height - (y + end.y + end.height)


# -- words ---------------------------------------------------------------------------------------------------------------------------------


def _kind(op_type: str) -> str:
    return next((kind for kind, (_, operators) in _KINDS.items() if op_type in operators), "others")


def _roles(node: onnx.NodeProto, body: onnx.GraphProto) -> dict[str, str]:
    """What the inputs and outputs of a body are: states that go on to the next step, or a step of a sequence."""
    given, made = [v.name for v in body.input], [v.name for v in body.output]
    if node.op_type == "Scan":
        scanned = helper.get_node_attr_value(node, "num_scan_inputs")
        states = len(given) - scanned
        roles = {name: "state" if k < states else "a step of the input" for k, name in enumerate(given)}
        return roles | {name: "state, for the next step" if k < states else "a step of the result" for k, name in enumerate(made)}
    if node.op_type == "Loop":
        roles = {name: ("number of the step", "condition", "state")[min(k, 2)] for k, name in enumerate(given)}
        states = len(given) - 2
        return roles | {
            name: "condition" if k == 0 else "state, for the next step" if k <= states else "a step of the result"
            for k, name in enumerate(made)
        }
    return {}


def _shape(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return value.type.WhichOneof("value") or ""
    dtype = _dtype(kind.elem_type)
    if not kind.HasField("shape"):
        return dtype.strip()
    dims = [str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in kind.shape.dim]
    return f"{dtype}{' × '.join(dims) or 'scalar'}"


def _dtype(code: int) -> str:
    """Said where it is not float32."""
    if code == onnx.TensorProto.FLOAT:
        return ""
    return f"{onnx.TensorProto.DataType.Name(code).lower()} " if code else ""


def _formal(node: onnx.NodeProto, place: int) -> str:
    """What the operator calls this input, where it has more than one."""
    try:
        formal = onnx.defs.get_schema(node.op_type, domain=node.domain).inputs
    except onnx.defs.SchemaError:
        return ""
    return f"{formal[place].name} = " if place < len(formal) and len(formal) > 1 else ""


def _constant(name: str, tensor: onnx.TensorProto) -> str:
    """A few numbers themselves; of more the name and the shape."""
    count = int(numpy.prod(tensor.dims, dtype=int))
    if count <= 4 and tensor.data_location != onnx.TensorProto.EXTERNAL:
        values = numpy_helper.to_array(tensor)
        return numpy.array2string(values.astype(numpy.float32) if values.dtype.kind == "V" else values, precision=4, separator=", ")
    return f"{name}: {_dtype(tensor.data_type)}{' × '.join(map(str, tensor.dims))}"


def _constant_of(node: onnx.NodeProto) -> str:
    a = node.attribute[0]
    return _constant(node.output[0], a.t) if a.name == "value" else str(helper.get_attribute_value(a))


def _attributes(node: onnx.NodeProto) -> str:
    found = []
    for a in node.attribute:
        if a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) or a.name == "num_scan_inputs":
            continue
        value = helper.get_attribute_value(a)
        if isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value).tolist()
        if isinstance(value, list | tuple):
            value = [v.decode() if isinstance(v, bytes) else v for v in value]
        text = value.decode() if isinstance(value, bytes) else f"{value:.4g}" if isinstance(value, float) else str(value)
        found.append(f"{a.name}={text}")
    said = ", ".join(found)
    return said if len(said) <= 60 else f"{said[:57]}…"


# -- SVG -----------------------------------------------------------------------------------------------------------------------------------


def _width(text: str, size: float, *, bold: bool = False) -> float:
    """About as wide as a sans-serif font writes it."""
    narrow = sum(c in "iljt.,:;'|!()[]f " for c in text)
    wide = sum(c in "mwMW×→…%" or c.isupper() for c in text)
    return (0.57 * len(text) - 0.24 * narrow + 0.16 * wide) * size * (1.14 if bold else 1.03)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    about = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y:.1f}"{about}>{escape(text)}</text>'


def _path(points: list[tuple[float, float, float]]) -> str:
    """Down through the layers, and in a curve between two of them."""
    x, _, y = points[0]
    drawn = [f"M{x:.1f},{points[0][1]:.1f} V{y:.1f}"]
    for to, top, bottom in points[1:]:
        middle = (y + top) / 2
        drawn.append(f"C{x:.1f},{middle:.1f} {to:.1f},{middle:.1f} {to:.1f},{top:.1f}")
        if bottom > top:
            drawn.append(f"V{bottom:.1f}")
        x, y = to, bottom
    return f'<path class="line" d="{" ".join(drawn)}" marker-end="url(#tip)"/>'
