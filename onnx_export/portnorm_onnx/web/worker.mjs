// Runs models in onnxruntime-web or onnxruntime-node: node worker.mjs PACKAGE, told what to do on its standard input. See runtimes.py.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder] = process.argv.slice(2);
const script = join(folder, "dist", "ort.wasm.min.mjs");
const isWeb = existsSync(script);
const ort = isWeb ? await import(pathToFileURL(script).href) : createRequire(import.meta.url)(folder);
if (isWeb) {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = pathToFileURL(join(folder, "dist") + "/").href;
}

const TYPES = {
  float16: ["float16", Uint16Array], float32: ["float32", Float32Array], float64: ["float64", Float64Array],
  int32: ["int32", Int32Array], int64: ["int64", BigInt64Array], bool: ["bool", Uint8Array],
};

const answer = (head, parts = []) => process.stdout.write(Buffer.concat([Buffer.from(JSON.stringify(head) + "\n"), ...parts]));

let waiting = Buffer.alloc(0);
const chunks = process.stdin[Symbol.asyncIterator]();
async function take(enough) {
  let end;
  while ((end = enough(waiting)) === null) {
    const { value, done } = await chunks.next();
    if (done) return null;
    waiting = Buffer.concat([waiting, value]);
  }
  const taken = waiting.subarray(0, end);
  waiting = waiting.subarray(end);
  return taken;
}

const line = async () => await take((b) => (b.indexOf(10) < 0 ? null : b.indexOf(10) + 1));
const sessions = new Map();

async function load(model, beside) {
  return await ort.InferenceSession.create(isWeb ? readFileSync(model) : model, {
    executionProviders: [isWeb ? "wasm" : "cpu"],
    logSeverityLevel: 3,
    intraOpNumThreads: 1,
    externalData: (isWeb ? beside : []).map((name) => ({ path: name, data: readFileSync(join(dirname(model), name)) })),
  });
}

// Steps of x (steps, …), what an output gives fed into the input that `fed` names; microseconds per step by turn.
async function looped(session, given, fed) {
  const { x, ...states } = given;
  const [steps, ...shape] = x.dims;
  const size = x.data.length / steps;
  const rows = Array.from({ length: steps }, (_, t) => new ort.Tensor(x.type, x.data.slice(t * size, (t + 1) * size), shape));
  const [y, microseconds] = [[], []];
  for (let turn = 0; turn < 3; turn++) {
    const feeds = { ...states };
    const started = performance.now();
    for (const row of rows) {
      feeds.x = row;
      const found = await session.run(feeds);
      for (const [output, taken] of Object.entries(fed)) feeds[taken] = found[output];
      if (turn === 0) y.push(found.y);
    }
    microseconds.push(((performance.now() - started) * 1000) / steps);
  }
  return { y, microseconds };
}

for (;;) {
  const told = await line();
  if (told === null) break;
  const head = JSON.parse(told.toString());
  try {
    if (head.load) {
      sessions.set(head.session, await load(head.load, head.beside));
      answer({ arrays: [] });
      continue;
    }
    const feeds = {};
    for (const { name, dtype, shape } of head.arrays) {
      const [type, Typed] = TYPES[dtype] ?? [dtype, Uint8Array];
      const size = shape.reduce((a, b) => a * b, 1) * (TYPES[dtype] ? Typed.BYTES_PER_ELEMENT : 2);
      const bytes = await take((b) => (b.length < size ? null : size));
      feeds[name] = new ort.Tensor(type, new Typed(Uint8Array.from(bytes).buffer), shape);
    }
    const session = sessions.get(head.session);
    if (head.fed) {
      const { y, microseconds } = await looped(session, feeds, head.fed);
      const times = Buffer.from(Float64Array.from(microseconds).buffer);
      const parts = y.map((t) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength));
      const arrays = [
        { name: "y", dtype: y[0].type, shape: [y.length, ...y[0].dims] },
        { name: "microseconds", dtype: "float64", shape: [microseconds.length] },
      ];
      answer({ arrays }, [...parts, times]);
      continue;
    }
    const results = await session.run(feeds);
    const named = session.outputNames.map((name) => [name, results[name]]);
    answer(
      { arrays: named.map(([name, t]) => ({ name, dtype: t.type, shape: t.dims })) },
      named.map(([, t]) => Buffer.from(t.data.buffer, t.data.byteOffset, t.data.byteLength)),
    );
  } catch (error) {
    answer({ error: String(error.message ?? error).split("\n")[0].slice(0, 400) });
  }
}
process.exit(0);
