// A stream in Node.js: node in_node.cjs FOLDER, with onnxruntime-node installed where Node looks for it.
const { readFileSync, writeFileSync } = require("node:fs");
const { join } = require("node:path");
const ort = require("onnxruntime-node");

const zeros = () => new ort.Tensor("float32", new Float32Array(32), [1, 1, 32]); // (layers, batch, features)

async function main(folder) {
  const session = await ort.InferenceSession.create(join(folder, "portable.onnx"));
  const steps = new Float32Array(new Uint8Array(readFileSync(join(folder, "x.bin"))).buffer);
  const ys = [];
  let [h, c] = [zeros(), zeros()];
  for (let t = 0; t < steps.length; t += 16) {
    const x = new ort.Tensor("float32", steps.slice(t, t + 16), [1, 16]);
    const found = await session.run({ x, h_0: h, c_0: c });
    [h, c] = [found.h_n, found.c_n];
    ys.push(...found.y.data);
  }
  writeFileSync(join(folder, "y.bin"), Buffer.from(Float32Array.from(ys).buffer));
}

main(process.argv[2]);
