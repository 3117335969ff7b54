"""silero-vad (is somebody speaking?): sound in chunks of 32 ms, an LSTM whose state goes from chunk to chunk, from both of its files.

Run `python docs/examples/real_silero_vad.py`. In the ONNX file the LSTM is a node in a branch of an `If`, its weights slices of constants
outside; portnorm reads it from there. The JIT file runs code when it is read: `prepared` does so, in torch, and keeps arrays alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import compose, helper, numpy_helper, parser
from side_by_side import Case, main, package_file, session

import portnorm as pn

BRANCH = {16000: "then_branch", 8000: "else_branch"}
STRIDES = (1, 2, 2, 1)
Step = Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]
"""A chunk with what went before it, (1, samples), and a state, to the probability (1, 1) and the state."""


def from_onnx(rate: int) -> tuple[pn.Layer, dict[str, np.ndarray]]:
    """The LSTM, and the weights around it, out of the ONNX file."""
    path = package_file("silero-vad", "silero_vad/data/silero_vad.onnx")
    choice = next(node for node in onnx.load(path).graph.node if node.op_type == "If")
    branch = next(a.g for a in choice.attribute if a.name == BRANCH[rate])
    constants = {node.output[0]: node.attribute[0].t for node in branch.node if node.op_type == "Constant"}
    arrays = {name.partition("__Inline_0__")[2]: numpy_helper.to_array(tensor) for name, tensor in constants.items()}
    prefix = f"If_0/{BRANCH[rate]}/If_0_{BRANCH[rate]}__Inline_0__/decoder/If_1/then_branch/"
    return pn.import_checkpoint(path, prefix=prefix), arrays


def prepared(folder: Path) -> Path:
    """The arrays of the JIT file as safetensors. This needs torch, and runs what is in the file; it is done once."""
    import torch
    from safetensors.torch import save_file

    save_file(torch.jit.load(package_file("silero-vad", "silero_vad/data/silero_vad.jit")).state_dict(), folder / "silero.safetensors")
    return folder / "silero.safetensors"


def from_jit(rate: int) -> tuple[pn.Layer, dict[str, np.ndarray]]:
    from safetensors.numpy import load_file

    prefix = {16000: "_model.", 8000: "_model_8k."}[rate]
    with tempfile.TemporaryDirectory() as folder:
        path = prepared(Path(folder))
        arrays = {name.removeprefix(prefix): a for name, a in load_file(path).items() if name.startswith(prefix)}
        return pn.import_checkpoint(path, prefix=f"{prefix}decoder.rnn."), arrays


def in_numpy(lstm: pn.Layer, arrays: dict[str, np.ndarray]) -> Step:
    """With one array for what each convolution reads, whose edges stay 0, so that a chunk makes few new ones."""
    basis = arrays["stft.forward_basis_buffer"][:, 0].T
    size, bins = basis.shape[0], basis.shape[1] // 2
    wave = np.zeros(5 * size // 2, "float32")
    windows, spectrum = sliding_window_view(wave, size)[:: size // 2], np.zeros((6, bins), "float32")
    convolutions, reads = [], spectrum
    for n, stride in enumerate(STRIDES):  # of width 3, one step of padding on each side
        w, shift = (arrays[f"encoder.{n}.reparam_conv.{p}"] for p in ("weight", "bias"))
        seen = sliding_window_view(reads, (3, reads.shape[1]))[::stride, 0]
        reads = np.zeros((len(seen) + 2, len(w)), "float32")
        convolutions.append((seen, w.transpose(2, 1, 0).reshape(-1, len(w)), shift, reads[1:-1]))
    weight, bias = arrays["decoder.decoder.2.weight"][:, :, 0].T, arrays["decoder.decoder.2.bias"]

    def step(x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        wave[: x.shape[1]], wave[x.shape[1] :] = x[0], x[0, -2 : -size // 4 - 2 : -1]  # reflected at the end
        y = np.ascontiguousarray(windows) @ basis
        y *= y
        np.sqrt(y[:, :bins] + y[:, bins:], out=spectrum[1:-1])
        for seen, kernel, shift, into in convolutions:
            np.maximum(seen.reshape(len(seen), -1) @ kernel + shift, 0, out=into)
        h, state = lstm.step(into, state)
        return 1 / (1 + np.exp(-(np.maximum(h, 0) @ weight + bias))), state

    return step


def in_onnx(lstm: pn.Layer, arrays: dict[str, np.ndarray]) -> Step:
    """One step of the LSTM as portnorm writes it, between the convolutions and the head, without `If` or open lengths."""
    middle = pn.export(lstm, None, streaming=True, prefix="lstm/", names={"h_0": "h_0", "c_0": "c_0", "h_n": "h_n", "c_n": "c_n"}).model
    size = arrays["stft.forward_basis_buffer"].shape[2]
    layers = "".join(
        f"c{n} = Conv<pads=[1, 1], strides=[{stride}]>(r{n}, encoder.{n}.reparam_conv.weight, encoder.{n}.reparam_conv.bias) "
        f"r{n + 1} = Relu(c{n}) "
        for n, stride in enumerate(STRIDES)
    ).replace(".", "_")
    front = f"""front (float[batch, {size // 4 + 2 * size}] samples) => (float[batch, 128] z) {{
        whole = Pad<mode="reflect">(samples, ends) one = Unsqueeze(whole, axis)
        waves = Conv<strides=[{size // 2}]>(one, stft_forward_basis_buffer)
        re, im = Split<axis=1, num_outputs=2>(waves) a = Mul(re, re) b = Mul(im, im) sum = Add(a, b) r0 = Sqrt(sum)
        {layers} z = Squeeze(r4, last) }}"""
    head = """head (float[batch, 128] h) => (float[batch, 1] output) {
        r = Relu(h) s = Gemm<transB=1>(r, decoder_decoder_2_weight, decoder_decoder_2_bias) output = Sigmoid(s) }"""
    own = {name.replace(".", "_"): a for name, a in arrays.items()} | {"ends": np.array([0, 0, 0, size // 4]), "axis": np.array([1])}
    own |= {"last": np.array([2]), "decoder_decoder_2_weight": arrays["decoder.decoder.2.weight"][:, :, 0]}
    whole = compose.merge_models(_model(front, own, middle), middle, io_map=[("z", "lstm/x")])
    whole = compose.merge_models(whole, _model(head, own, middle), io_map=[("lstm/y", "h")])
    run, zeros = session(whole), np.zeros((1, 1, 128), "float32")

    def step(x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        h, c = (zeros, zeros) if state is None else state
        found = dict(zip(names, run.run(None, {"samples": x, "h_0": h, "c_0": c}), strict=True))
        return found["output"], (found["h_n"], found["c_n"])

    names = [o.name for o in run.get_outputs()]
    return step


def _model(text: str, arrays: dict[str, np.ndarray], like: onnx.ModelProto) -> onnx.ModelProto:
    graph = parser.parse_graph(text)
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items() if name in used)
    return helper.make_model(graph, opset_imports=like.opset_import, ir_version=like.ir_version)


def original_onnx(rate: int) -> Step:
    run, sr, zeros = (
        session(package_file("silero-vad", "silero_vad/data/silero_vad.onnx")),
        np.array(rate),
        np.zeros((2, 1, 128), "float32"),
    )

    def step(x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        y, state = run.run(None, {"input": x, "state": zeros if state is None else state, "sr": sr})
        return y, state

    return step


def original_jit(rate: int) -> Step:
    import torch

    model = torch.jit.load(package_file("silero-vad", "silero_vad/data/silero_vad.jit"))
    net = {16000: model._model, 8000: model._model_8k}[rate].eval()

    def step(x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        with torch.no_grad():
            y, state = net(torch.from_numpy(x), torch.zeros(0) if state is None else state)
        return y.numpy(), state

    return step


def stream(step: Step, chunks: np.ndarray) -> np.ndarray:
    """The probability of each chunk, each with its state and the last quarter of a window from the one before."""
    context, state, found = chunks.shape[1] // 8, None, []
    before = np.zeros((1, context), "float32")
    for chunk in chunks:
        x = np.concatenate([before, chunk[None]], axis=1)
        y, state = step(x, state)
        found.append(y[0])
        before = x[:, -context:]
    return np.array(found)


def sound(rate: int, chunks: int = 60) -> np.ndarray:
    """(chunks, samples) of something like a vowel that comes and goes, in noise."""
    t = np.arange(chunks * rate * 32 // 1000) / rate
    pitch = np.cumsum(120 + 20 * np.sin(2 * np.pi * 3 * t)) / rate
    vowel = sum(np.sin(2 * np.pi * k * pitch) * np.exp(-((k * 120 - 700) ** 2) / 4e5) for k in range(1, 20))
    wave = 0.1 * vowel * (np.sin(2 * np.pi * 0.8 * t) > 0) + 0.003 * np.random.default_rng(0).standard_normal(len(t))
    return wave.astype("float32").reshape(chunks, -1)


def case(file: str, rate: int) -> Case:
    loaded = {"ONNX": from_onnx, "JIT": from_jit}[file](rate)
    theirs, by = {"ONNX": (original_onnx, "its file in onnxruntime"), "JIT": (original_jit, "its file in torch")}[file]
    chunks, steps = sound(rate), (in_numpy(*loaded), in_onnx(*loaded), theirs(rate))
    part = f"{file} file, {rate // 1000} kHz, {len(chunks)} chunks one by one"
    return Case("silero-vad", part, by, *(partial(stream, step, chunks) for step in steps))


def cases() -> Iterator[Case]:
    yield from (case(file, rate) for file in ("ONNX", "JIT") for rate in (16000, 8000))


if __name__ == "__main__":
    main(cases)
