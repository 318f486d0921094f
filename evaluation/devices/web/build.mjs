// Bundles the page into build/site, or with --tests the tests into build/tests.
import { build } from "esbuild";
import { cp, mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { gzipSync } from "node:zlib";

const common = { bundle: true, format: "esm", target: "es2022", legalComments: "none", logLevel: "warning" };

async function site() {
  await rm("build/site", { recursive: true, force: true });
  await mkdir("build/site", { recursive: true });
  await build({
    ...common, minify: true, entryPoints: ["src/page.ts", "src/worker.ts", "src/offline.ts"], outdir: "build/site",
  });
  for (const name of ["index.html", "style.css", "icon.svg"]) await cp(`src/${name}`, `build/site/${name}`);
  const runtime = createRequire(import.meta.url).resolve("onnxruntime-web/ort-wasm-simd-threaded.wasm");
  await writeFile("build/site/runtime.wasm.gz", gzipSync(await readFile(runtime), { level: 9 }));
}

async function tests() {
  await rm("build/tests", { recursive: true, force: true });
  await build({ ...common, platform: "node", entryPoints: ["tests/*.test.ts"], outdir: "build/tests" });
}

await (process.argv.includes("--tests") ? tests() : site());
