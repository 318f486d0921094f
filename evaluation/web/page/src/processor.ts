// Loads the model on the graphics processor (GPU) if that works, otherwise on the processor (CPU).
import { Engine, firstLine } from "./engine";
import { selftest } from "./selftest";
import type { Model, Progress, Site } from "./site";

export type Processor = "cpu" | "gpu";

export interface Started {
  engine: Engine;
  /** Why the graphics processor, which this device has, does not run the model. */
  problem?: string;
}

/** Loads the model. The graphics processor is used only if its output for one example equals Python's. */
export async function load(site: Site, model: Model, wanted: string | null, progress: Progress): Promise<Started> {
  let problem: string | undefined;
  if ((await processorOf(wanted)) === "gpu") {
    try {
      const engine = await Engine.load(site, model, "gpu", progress);
      const { differences } = await selftest(engine, async () => {}, 1);
      if (!differences.length) return { engine };
      problem = "its answer to an example differs from the expected one";
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

/** Returns "gpu" if the browser has WebGPU and suspendable WebAssembly. An emulated GPU is slow, so it must be asked for. */
async function processorOf(wanted: string | null): Promise<Processor> {
  const { gpu } = navigator as unknown as { gpu?: Gpu };
  if (wanted === "cpu" || !gpu || !("Suspending" in WebAssembly)) return "cpu";
  const adapter = await gpu.requestAdapter().catch(() => null);
  return adapter && (wanted === "gpu" || !adapter.info.isFallbackAdapter) ? "gpu" : "cpu";
}
