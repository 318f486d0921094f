// The service worker: caches the page's small files for use offline. site.ts caches the large ones.
// evaluation/web/site.py puts the definition of SITE, the version and the names of the small files, before this file.
declare const SITE: { version: string; files: string[] };

const worker = self as unknown as {
  addEventListener(type: string, listener: (event: never) => void): void;
  skipWaiting(): Promise<void>;
  clients: { claim(): Promise<void> };
  registration: { scope: string };
};
interface Waiting {
  waitUntil(work: Promise<unknown>): void;
}
interface Fetch {
  request: globalThis.Request;
  respondWith(response: Promise<Response>): void;
}

/** Prefix of this folder's caches; several sites of one host share the browser's storage. */
const PREFIX = `${new URL(worker.registration.scope).pathname} `;
const PAGE_CACHE = PREFIX + SITE.version;
const CURRENT_CACHES = [PAGE_CACHE, `${PREFIX}models`];

worker.addEventListener("install", (event: Waiting) => {
  const files = SITE.files.map((file) => new Request(file, { cache: "reload" }));
  event.waitUntil(caches.open(PAGE_CACHE).then((cache) => cache.addAll(files)).then(() => worker.skipWaiting()));
});

worker.addEventListener("activate", (event: Waiting) => {
  const remove = async () => {
    for (const name of await caches.keys()) {
      if (name.startsWith(PREFIX) && !CURRENT_CACHES.includes(name)) await caches.delete(name);
    }
    await worker.clients.claim();
  };
  event.waitUntil(remove());
});

worker.addEventListener("fetch", (event: Fetch) => {
  const { request } = event;
  const address = new URL(request.url);
  if (request.method !== "GET" || address.origin !== location.origin) return;
  if (request.mode === "navigate") address.pathname = new URL("index.html", worker.registration.scope).pathname;
  address.search = "";
  const cachedOrFetched = async () => {
    const cache = await caches.open(PAGE_CACHE);
    return (await cache.match(address)) ?? fetch(request);
  };
  event.respondWith(cachedOrFetched());
});
