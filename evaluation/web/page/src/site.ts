// Reads site.json and the large files of the folder, which are fetched once, checked, and cached for use offline.
import type { Processor } from "./processor";

export interface StoredFile {
  path: string;
  bytes: number;
  sha256: string;
}

export interface Model {
  /** `student`, `teacher`, or the name of one of several students. */
  role: string;
  name: string;
  kind: "spans" | "classification" | "regression" | "encoder";
  /** One name per class; empty for the other kinds. */
  labels: string[];
  inputs: string[];
  /** Number of texts per row, 1 or 2; null: unknown. */
  texts: number | null;
  /** Largest number of tokens per row. */
  length: number;
  /** Number of tokens that neighbouring windows share. */
  stride: number;
  graph: StoredFile;
  tokenizer: StoredFile;
  golden: StoredFile;
}

export interface Task {
  name: string;
  models: Model[];
}

export interface Site {
  runtimes: Record<Processor, StoredFile>;
  tasks: Task[];
}

export type Progress = (received: number, total: number) => void;

/** Name of this folder's cache of large files; several sites of one host share the browser's storage. */
const CACHE = `${new URL(".", location.href).pathname} models`;

export async function readSite(): Promise<Site> {
  const site = await readJson<Site>("site.json");
  if (!site.runtimes || !Array.isArray(site.tasks) || site.tasks.length === 0) {
    throw new Error("site.json is damaged. Export the page again.");
  }
  return site;
}

async function readJson<T>(path: string): Promise<T> {
  const response = await fetch(path).catch(() => undefined);
  if (!response?.ok) throw new Error(`${path} is missing. Export the page again, and copy the whole folder.`);
  return response.json().catch(() => {
    throw new Error(`${path} is damaged. Export the page again.`);
  });
}

/** Returns the content of a file, from the cache if possible. Throws if the file is missing or damaged. */
export async function read(file: StoredFile, progress: Progress = () => {}): Promise<ArrayBuffer> {
  const address = addressOf(file);
  const cache = typeof caches === "undefined" ? undefined : await caches.open(CACHE).catch(() => undefined);
  const cached = await cache?.match(address);
  if (cached) {
    progress(file.bytes, file.bytes);
    return cached.arrayBuffer();
  }
  const content = await download(address, file, progress);
  await verify(content, file);
  // If the browser does not grant the space, the page works, but not offline.
  await cache?.put(address, new Response(content.slice(0))).catch(() => {});
  return content;
}

function addressOf(file: StoredFile): string {
  return `${file.path}?${file.sha256.slice(0, 16)}`;
}

/** Removes large files from the cache that site.json does not name, for example those of an earlier export. */
export async function prune(site: Site): Promise<void> {
  if (typeof caches === "undefined") return;
  const files = site.tasks.flatMap(({ models }) => models.flatMap((model) => [model.graph, model.tokenizer, model.golden]));
  const wanted = new Set([...Object.values(site.runtimes), ...files].map((file) => new URL(addressOf(file), location.href).href));
  const cache = await caches.open(CACHE);
  for (const request of await cache.keys()) if (!wanted.has(request.url)) await cache.delete(request);
}

async function download(address: string, file: StoredFile, progress: Progress): Promise<ArrayBuffer> {
  const response = await fetch(address).catch(() => undefined);
  if (!response) throw new Error(`${file.path} could not be fetched: there is no connection.`);
  if (!response.ok || !response.body) throw new Error(`${file.path} is missing. Copy the whole folder.`);
  const content = new Uint8Array(file.bytes);
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read().catch(() => {
      throw new Error(`${file.path} broke off after ${received} of ${file.bytes} bytes. Load the page again.`);
    });
    if (done) break;
    if (received + value.length > file.bytes) throw damaged(file);
    content.set(value, received);
    received += value.length;
    progress(received, file.bytes);
  }
  if (received !== file.bytes) throw damaged(file);
  return content.buffer;
}

async function verify(content: ArrayBuffer, file: StoredFile): Promise<void> {
  if (!globalThis.crypto?.subtle) return; // browsers have crypto.subtle only over https and on localhost
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  const text = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (text !== file.sha256) throw damaged(file);
}

function damaged(file: StoredFile): Error {
  return new Error(`${file.path} is damaged: it is not the file that was exported. Copy it again.`);
}

export async function unpack(content: ArrayBuffer): Promise<ArrayBuffer> {
  const bytes = new Uint8Array(content);
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return content;
  const stream = new Blob([content]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}
