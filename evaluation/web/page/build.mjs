// Bundles the page into build/site, or with --tests the tests into build/tests.
import { build } from "esbuild";
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { gzipSync } from "node:zlib";

const RUNTIMES = { "runtime.wasm.gz": "ort-wasm-simd-threaded.wasm", "runtime-gpu.wasm.gz": "ort-wasm-simd-threaded.jspi.wasm" };
const common = { bundle: true, format: "esm", target: "es2022", legalComments: "none", logLevel: "warning" };

async function site() {
  await rm("build/site", { recursive: true, force: true });
  await mkdir("build/site", { recursive: true });
  const page = { ...common, minify: true, outdir: "build/site" };
  await build({ ...page, entryPoints: ["src/page.ts", "src/offline.ts"] });
  await build({ ...page, entryPoints: ["src/worker.ts"], splitting: true, chunkNames: "[name]" }); // one chunk per runtime
  for (const name of ["index.html", "style.css", "icon.svg"]) await cp(`src/${name}`, `build/site/${name}`);
  const { resolve } = createRequire(import.meta.url);
  for (const [name, source] of Object.entries(RUNTIMES)) {
    const binary = await readFile(resolve(`onnxruntime-web/${source}`));
    await writeFile(`build/site/${name}`, gzipSync(binary, { level: 9 }));
  }
}

async function tests() {
  await rm("build/tests", { recursive: true, force: true });
  await build({ ...common, platform: "node", entryPoints: ["tests/*.test.ts"], outdir: "build/tests" });
}

await (process.argv.includes("--tests") ? tests() : site());
