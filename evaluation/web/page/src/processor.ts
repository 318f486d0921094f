// Which processor of the device computes: the graphics processor where that works, else the processor.
import { Engine, firstLine } from "./engine";
import { selftest } from "./selftest";
import type { Model, Progress, Site } from "./site";

export type Processor = "cpu" | "gpu";

export interface Started {
  engine: Engine;
  /** Why the graphics processor does not compute although it is there. */
  problem?: string;
}

/** Loads the model. A graphics processor must first give Python's answer to an example. */
export async function load(site: Site, model: Model, wanted: string | null, progress: Progress): Promise<Started> {
  let problem: string | undefined;
  if ((await processorOf(wanted)) === "gpu") {
    try {
      const engine = await Engine.load(site, model, "gpu", progress);
      const { differences } = await selftest(engine, async () => {}, 1);
      if (!differences.length) return { engine };
      problem = "its answers are not Python's";
      await engine.release();
    } catch (error) {
      problem = firstLine(error);
    }
  }
  return { engine: await Engine.load(site, model, "cpu", progress), problem };
}

interface Gpu {
  requestAdapter(): Promise<{ info: { isFallbackAdapter?: boolean } } | null>;
}

/** The graphics processor needs WebGPU and WebAssembly that can be suspended. An emulated one is slow: only if it is wanted. */
async function processorOf(wanted: string | null): Promise<Processor> {
  const { gpu } = navigator as unknown as { gpu?: Gpu };
  if (wanted === "cpu" || !gpu || !("Suspending" in WebAssembly)) return "cpu";
  const adapter = await gpu.requestAdapter().catch(() => null);
  return adapter && (wanted === "gpu" || !adapter.info.isFallbackAdapter) ? "gpu" : "cpu";
}
